"""One row of a data file -> one `Sample`, whichever of the usual forms the row has. It opens no data file.

The forms are those of LLaVA and ShareGPT, of OpenAI and LLaMA-Factory, of TRL, of FineVision, of CoIN and UCIT, and plain
ones; see `FORMS`.
"""

import reprlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from alula.data.images import image_source, shown
from alula.data.sample import PLACEHOLDER, BadRow, ImageSource, Message, Sample
from alula.errors import counted, nearest

Row = dict[str, Any]
Turns = list[tuple[str, Any]]
"""(role, content) pairs; content is a string or typed parts."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "developer": "system",
    "text": "text",
}
OPTIONAL = ("id", "image", "images", "options", "accepted", "language", "system")


def sample_from_row(row: Row, *, origin: str, roots: Sequence[Path]) -> Sample:
    """The sample that `row` describes.

    A row names its images in ``image`` or ``images`` (a path, a data: URI, ``{"bytes", "path"}`` or a list of these) or
    inside typed parts. Each ``<image>`` and each image part takes the next of them; if there is neither, the images
    come before the first question. Keys that mean nothing here are ignored, unless they look like a misspelt one.

    Args:
        origin: ``file.jsonl:12``, which every error begins with.
        roots: the folders that relative image paths may start at.

    Raises:
        BadRow: an unknown form, role or modality; a missing image; another number of placeholders than of images;
            an empty or missing answer; an answer that is not among the options.
    """
    row = {key: value for key, value in row.items() if value is not None}
    turns = _with_system(_turns_reader(row, origin)(row, origin), row, origin)
    _refuse_lost_keys(row, origin)
    column = [image_source(value, origin=origin, roots=roots) for value in _image_values(row, origin)]
    messages, images = _place_images(turns, column, origin=origin, roots=roots)
    answers = _strings(row.get("answer"), "answer", origin)
    options = _strings(row.get("options"), "options", origin)
    sample = Sample(
        id=str(row.get("id", row.get("question_id", origin))),
        messages=messages,
        images=images,
        options=options,
        accepted=(*answers[1:], *_strings(row.get("accepted"), "accepted", origin)),
        origin=origin,
        language=str(row.get("language", "en")),
    )
    if options and sample.answer not in options:
        raise BadRow(
            f"{origin}: the answer {sample.answer!r} is not among the options {list(options)}. "
            "Write it as one of the options is written, or remove 'options'.",
            kind="options",
        )
    return sample


def _from_messages(row: Row, origin: str) -> Turns:
    return _turns(row["messages"], "messages", origin)


def _from_conversations(row: Row, origin: str) -> Turns:
    return _turns(row["conversations"], "conversations", origin)


def _from_prompt(row: Row, origin: str) -> Turns:
    prompt, completion = row["prompt"], row["completion"]
    asked = [("user", prompt)] if isinstance(prompt, str) else _turns(prompt, "prompt", origin)
    answered = [("assistant", completion)] if isinstance(completion, str) else _turns(completion, "completion", origin)
    return asked + answered


def _from_question(row: Row, origin: str, *, key: str = "question") -> Turns:
    answers = _strings(row["answer"], "answer", origin)
    return [("user", _string(row[key], key, origin)), ("assistant", answers[0] if answers else "")]


def _from_evaluation(row: Row, origin: str) -> Turns:
    return _from_question(row, origin, key="text")


def _from_instruction(row: Row, origin: str) -> Turns:
    if row.get("history"):
        raise BadRow(f"{origin}: 'history' cannot be read. Write the turns as 'messages', or remove the key.")
    asked = [_string(row[key], key, origin) for key in ("instruction", "input") if row.get(key)]
    return [("user", "\n".join(asked)), ("assistant", _string(row["output"], "output", origin))]


def _from_texts(row: Row, origin: str) -> Turns:
    pairs = row["texts"]
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) and {"user", "assistant"} <= set(pair) for pair in pairs):
        raise BadRow(f"{origin}: 'texts' is {shown(pairs)}, a list of {{'user', 'assistant'}} objects is wanted.")
    return [(role, _string(pair[role], role, origin)) for pair in pairs for role in ("user", "assistant")]


def _from_text(row: Row, origin: str) -> Turns:
    if "question_id" in row:  # a question of LLaVA's evaluation, whose answer is in another file
        raise BadRow(f"{origin}: 'text' asks, but there is no 'answer'. Add 'answer' to the row.", kind="no answer")
    return [("assistant", _string(row["text"], "text", origin))]


FORMS: dict[tuple[str, ...], Callable[[Row, str], Turns]] = {
    ("messages",): _from_messages,
    ("conversations",): _from_conversations,
    ("prompt", "completion"): _from_prompt,
    ("question", "answer"): _from_question,
    ("instruction", "output"): _from_instruction,
    ("texts",): _from_texts,
    ("text", "answer"): _from_evaluation,
    ("text",): _from_text,
}
"""The keys that tell a row's form, and what reads it; the first that fits is taken."""


def _turns_reader(row: Row, origin: str) -> Callable[[Row, str], Turns]:
    for needed, reader in FORMS.items():
        if all(key in row for key in needed):
            return reader
    forms = "; ".join(" + ".join(f"'{key}'" for key in needed) for needed in FORMS)
    half = [key for needed in FORMS for key in needed if key not in row and any(other in row for other in needed)]
    lists = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    wrapped = f"If the rows are in '{lists[0]}', write that list alone" if lists else "Rename the row's keys to one of these forms"
    todo = f"Add '{half[0]}' to the row" if half else wrapped
    raise BadRow(f"{origin}: no known row form in the keys {sorted(row)}. Known: {forms}. {todo}.")


def _with_system(turns: Turns, row: Row, origin: str) -> Turns:
    """`turns` after the system message that ShareGPT rows keep beside them; running text has none."""
    if "system" not in row or len(turns) == 1 or turns[0][0] == "system":
        return turns
    told = _string(row["system"], "system", origin)
    return [("system", told), *turns] if told.strip() else turns


def _refuse_lost_keys(row: Row, origin: str) -> None:
    """Refuses what would otherwise be dropped without a word: other media, misspelt keys, images under another name."""
    known = {*OPTIONAL, *(key for needed in FORMS for key in needed)}
    for key, value in row.items():
        if key in known or not value:
            continue
        if key in ("video", "videos", "audio", "audios"):
            raise BadRow(f"{origin}: '{key}' cannot be read. Text and images can. Drop the row or the key.", kind="media")
        hint = nearest(key, set(OPTIONAL) - row.keys())
        looks_like_image = "image" not in row and "images" not in row and _names_a_picture(key, value)
        if looks_like_image or _is_misspelt(key, set(OPTIONAL) - row.keys()):
            raise BadRow(f"{origin}: unknown key '{key}'. {hint} Rename the key, or remove it.")


def _names_a_picture(key: str, value: Any) -> bool:
    words = key.lower().replace("-", "_").split("_")
    is_named = any(word in ("image", "images", "img", "imgs", "picture", "photo") for word in words)
    return is_named and isinstance(value, str | bytes | dict | list) and "id" not in words


def _is_misspelt(key: str, known: set[str]) -> bool:
    """Whether `key` is a known key with one letter wrong, missing or added, or in another case."""
    return any(key.lower() == word or _one_edit_apart(key.lower(), word) for word in known if len(word) > 3)


def _one_edit_apart(left: str, right: str) -> bool:
    short, long = sorted((left, right), key=len)
    if len(long) - len(short) > 1:
        return False
    at = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    return short[at:] == long[at + 1 :] or short[at + 1 :] == long[at + 1 :]


def _turns(value: Any, key: str, origin: str) -> Turns:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{origin}: '{key}' is {shown(value)}, a list of messages is wanted. Correct the row.")
    return [_turn(message, f"{key}[{i}]", origin) for i, message in enumerate(value)]


def _turn(message: Any, where: str, origin: str) -> tuple[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f"{origin}: {where} is {shown(message)}, an object with role and content is wanted.")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        came = f"{origin}: {where} has role {reprlib.repr(role)}."
        raise BadRow(f"{came} Known: {', '.join(ROLES)}. Rename or drop the message.", kind="role")
    ignored = [key for key in ("loss", "weight", "tool_calls", "train") if message.get(key) is not None]
    if ignored:
        raise BadRow(
            f"{origin}: {where} has '{ignored[0]}', which cannot be honoured: every assistant message is learnt whole. "
            "Remove the key, or split the row."
        )
    if not isinstance(content, str | list):
        raise BadRow(f"{origin}: {where} has the content {shown(content)}. A string or typed parts are wanted.")
    return ROLES[role], content


def _place_images(
    turns: Turns, column: list[ImageSource], *, origin: str, roots: Sequence[Path]
) -> tuple[tuple[Message, ...], tuple[ImageSource, ...]]:
    """The messages with one placeholder an image, and the images in the order of the placeholders."""
    remaining, images, messages = iter(column), list[ImageSource](), list[Message]()
    for role, content in turns:
        pieces: list[str] = []
        for piece, own in _pieces(content, origin):
            pieces.append(piece)
            if own is not None:
                images.append(image_source(own, origin=origin, roots=roots))
            else:
                images.extend(source for _, source in zip(range(piece.count(PLACEHOLDER)), remaining, strict=False))
        text = "".join(pieces)
        if role == "assistant" and not text.strip():
            message = f"{origin}: the answer is empty. Give the text that is to be learnt, or drop the row."
            raise BadRow(message, kind="empty answer")
        if role == "assistant" and PLACEHOLDER in text:
            message = f"{origin}: an assistant message holds '{PLACEHOLDER}'. Move it into a user message."
            raise BadRow(message, kind="placeholders")
        messages.append(Message(role=role, content=text))
    if column and not any(PLACEHOLDER in message.content for message in messages):
        return _with_images_first(messages, len(column), origin), tuple(column)
    return tuple(messages), (*images, *remaining)


def _with_images_first(messages: list[Message], count: int, origin: str) -> tuple[Message, ...]:
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        message = f"{origin}: {counted(count, 'image')}, but no user message. Add one to put them in, or drop the images."
        raise BadRow(message, kind="placeholders")
    asked = Message(role="user", content=f"{PLACEHOLDER}\n" * count + messages[first].content)
    return (*messages[:first], asked, *messages[first + 1 :])


def _pieces(content: str | list, origin: str) -> Iterator[tuple[str, Any]]:
    """(text, image of its own) for each typed part; a string is one piece without an image of its own."""
    for part in [content] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            yield part, None
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            yield part["text"], None
        elif kind in ("image", "image_url", "input_image"):
            own = next((part[key] for key in ("image_url", "image", "path", "url") if part.get(key) is not None), None)
            yield PLACEHOLDER, own
        else:
            raise BadRow(
                f"{origin}: a content part is {shown(part)}. Known: {{'type': 'text', 'text': ...}}, "
                "{'type': 'image'}, {'type': 'image_url', 'image_url': {'url': ...}}. Correct or drop the part."
            )


def _image_values(row: Row, origin: str) -> list[Any]:
    if row.get("image") and row.get("images"):
        raise BadRow(f"{origin}: both 'image' and 'images' are given. Put all of them into 'images'.", kind="placeholders")
    values = row.get("image") or row.get("images") or []
    return values if isinstance(values, list) else [values]


def _strings(value: Any, key: str, origin: str) -> tuple[str, ...]:
    """`value` as strings: one, or a list of them; numbers are written out."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    wrong = next((item for item in values if isinstance(item, bool) or not isinstance(item, str | int | float)), None)
    if wrong is not None:
        raise BadRow(f"{origin}: '{key}' is {shown(wrong)}. A string or a list of strings is wanted.")
    return tuple(str(item) for item in values)


def _string(value: Any, key: str, origin: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{origin}: '{key}' is {shown(value)}. A string is wanted.")
    return value
