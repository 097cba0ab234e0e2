"""One row of a data file -> one `Sample`, whichever of the usual forms the row has. It opens no data file.

The forms are those of LLaVA, of OpenAI and LLaMA-Factory, of TRL, of FineVision, and plain ones; see `FORMS`.
"""

import base64
import binascii
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from alula.data.sample import PLACEHOLDER, ImageSource, Message, Sample
from alula.errors import UserError, nearest

Row = dict[str, Any]
Turns = list[tuple[str, Any]]
"""(role, content) pairs; content is a string or typed parts."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
OPTIONAL = ("id", "image", "images", "options", "accepted", "language")


def sample_from_row(row: Row, *, origin: str, image_root: Path) -> Sample:
    """The sample that `row` describes.

    A row names its images in ``image`` or ``images`` (a path, a data: URI, ``{"bytes", "path"}`` or a list of these) or
    inside typed parts. Each ``<image>`` and each image part takes the next of them; if there is neither, the images
    come before the first question. Keys that mean nothing here are ignored, unless they look like a misspelt one.

    Args:
        origin: ``file.jsonl:12``, which every error begins with.
        image_root: the folder that relative image paths start at.

    Raises:
        UserError: an unknown form, role or modality; a missing image; another number of placeholders than of images;
            an empty or missing answer; an answer that is not among the options.
    """
    row = {key: value for key, value in row.items() if value is not None}
    turns = _turns_reader(row, origin)(row, origin)
    _refuse_lost_keys(row, origin)
    column = [_source(value, origin=origin, image_root=image_root) for value in _image_values(row, origin)]
    messages, images = _place_images(turns, column, origin=origin, image_root=image_root)
    answers = _strings(row.get("answer"), "answer", origin)
    options = _strings(row.get("options"), "options", origin)
    sample = Sample(
        id=str(row.get("id", origin)),
        messages=messages,
        images=images,
        options=options,
        accepted=(*answers[1:], *_strings(row.get("accepted"), "accepted", origin)),
        origin=origin,
        language=str(row.get("language", "en")),
    )
    if options and sample.answer not in options:
        raise UserError(
            f"{origin}: the answer {sample.answer!r} is not among the options {list(options)}. "
            "Write it as one of the options is written, or remove 'options'."
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


def _from_question(row: Row, origin: str) -> Turns:
    answers = _strings(row["answer"], "answer", origin)
    return [("user", _string(row["question"], "question", origin)), ("assistant", answers[0] if answers else "")]


def _from_texts(row: Row, origin: str) -> Turns:
    pairs = row["texts"]
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) and {"user", "assistant"} <= set(pair) for pair in pairs):
        raise UserError(f"{origin}: 'texts' is {_shown(pairs)}, a list of {{'user', 'assistant'}} objects is wanted.")
    return [(role, _string(pair[role], role, origin)) for pair in pairs for role in ("user", "assistant")]


def _from_text(row: Row, origin: str) -> Turns:
    return [("assistant", _string(row["text"], "text", origin))]


FORMS: dict[tuple[str, ...], Callable[[Row, str], Turns]] = {
    ("messages",): _from_messages,
    ("conversations",): _from_conversations,
    ("prompt", "completion"): _from_prompt,
    ("question", "answer"): _from_question,
    ("texts",): _from_texts,
    ("text",): _from_text,
}
"""The keys that tell a row's form, and what reads it; the first that fits is taken."""


def _turns_reader(row: Row, origin: str) -> Callable[[Row, str], Turns]:
    for needed, reader in FORMS.items():
        if all(key in row for key in needed):
            return reader
    forms = "; ".join(" + ".join(f"'{key}'" for key in needed) for needed in FORMS)
    half = [key for needed in FORMS for key in needed if key not in row and any(other in row for other in needed)]
    todo = f"Add '{half[0]}' to the row" if half else "Rename the row's keys to one of these forms"
    raise UserError(f"{origin}: no known row form in the keys {sorted(row)}. Known: {forms}. {todo}.")


def _refuse_lost_keys(row: Row, origin: str) -> None:
    """Refuses what would otherwise be dropped without a word: other media, misspelt keys, images under another name."""
    known = {*OPTIONAL, *(key for needed in FORMS for key in needed)}
    for key, value in row.items():
        if key in known or not value:
            continue
        if key in ("video", "videos", "audio", "audios"):
            raise UserError(f"{origin}: '{key}' cannot be read. Text and images can. Drop the row or the key.")
        hint = nearest(key, set(OPTIONAL) - row.keys())
        looks_like_image = "image" not in row and "images" not in row and _names_a_picture(key, value)
        if looks_like_image or _is_misspelt(key, set(OPTIONAL) - row.keys()):
            raise UserError(f"{origin}: unknown key '{key}'. {hint} Rename the key, or remove it.")


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
        raise UserError(f"{origin}: '{key}' is {_shown(value)}, a list of messages is wanted. Correct the row.")
    return [_turn(message, f"{key}[{i}]", origin) for i, message in enumerate(value)]


def _turn(message: Any, where: str, origin: str) -> tuple[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"{origin}: {where} is {_shown(message)}, an object with role and content is wanted.")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if role not in ROLES:
        raise UserError(f"{origin}: {where} has role {role!r}. Known: {', '.join(ROLES)}. Rename or drop the message.")
    ignored = [key for key in ("loss", "weight", "tool_calls", "train") if message.get(key) is not None]
    if ignored:
        raise UserError(
            f"{origin}: {where} has '{ignored[0]}', which cannot be honoured: every assistant message is learnt whole. "
            "Remove the key, or split the row."
        )
    if not isinstance(content, str | list):
        raise UserError(f"{origin}: {where} has the content {_shown(content)}. A string or typed parts are wanted.")
    return ROLES[role], content


def _place_images(
    turns: Turns, column: list[ImageSource], *, origin: str, image_root: Path
) -> tuple[tuple[Message, ...], tuple[ImageSource, ...]]:
    """The messages with one placeholder an image, and the images in the order of the placeholders."""
    remaining, images, messages = iter(column), list[ImageSource](), list[Message]()
    for role, content in turns:
        pieces: list[str] = []
        for piece, own in _pieces(content, origin):
            pieces.append(piece)
            if own is not None:
                images.append(_source(own, origin=origin, image_root=image_root))
            else:
                images.extend(source for _, source in zip(range(piece.count(PLACEHOLDER)), remaining, strict=False))
        text = "".join(pieces)
        if role == "assistant" and not text.strip():
            raise UserError(f"{origin}: the answer is empty. Give the text that is to be learnt, or drop the row.")
        if role == "assistant" and PLACEHOLDER in text:
            raise UserError(f"{origin}: an assistant message holds '{PLACEHOLDER}'. Move it into a user message.")
        messages.append(Message(role=role, content=text))
    if column and not any(PLACEHOLDER in message.content for message in messages):
        return _with_images_first(messages, len(column), origin), tuple(column)
    return tuple(messages), (*images, *remaining)


def _with_images_first(messages: list[Message], count: int, origin: str) -> tuple[Message, ...]:
    first = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    if first is None:
        raise UserError(f"{origin}: {count} images, but no user message to put them in. Add one, or drop the images.")
    asked = Message(role="user", content=f"{PLACEHOLDER}\n" * count + messages[first].content)
    return (*messages[:first], asked, *messages[first + 1 :])


def _pieces(content: str | list, origin: str) -> Iterator[tuple[str, Any]]:
    """(text, image of its own) for each typed part; a string is one piece without an image of its own."""
    for part in [content] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            yield part, None
        elif kind == "text" and isinstance(part.get("text"), str):
            yield part["text"], None
        elif kind in ("image", "image_url"):
            own = next((part[key] for key in ("image_url", "image", "path", "url") if part.get(key) is not None), None)
            yield PLACEHOLDER, own
        else:
            raise UserError(
                f"{origin}: a content part is {_shown(part)}. Known: {{'type': 'text', 'text': ...}}, "
                "{'type': 'image'}, {'type': 'image_url', 'image_url': {'url': ...}}. Correct or drop the part."
            )


def _image_values(row: Row, origin: str) -> list[Any]:
    if row.get("image") and row.get("images"):
        raise UserError(f"{origin}: both 'image' and 'images' are given. Put all of them into 'images'.")
    values = row.get("image") or row.get("images") or []
    return values if isinstance(values, list) else [values]


def _source(value: Any, *, origin: str, image_root: Path) -> ImageSource:
    """Where the image is, as `Sample` wants it; a path is checked for existence only."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "url", "path", "image") if value.get(key)), None)
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise UserError(f"{origin}: an image is {_shown(value)}. A path, a data: URI or image bytes are wanted.")
    if value.startswith("data:"):
        return _from_data_uri(value, origin)
    if value.startswith(("http://", "https://")):
        raise UserError(f"{origin}: {value} is a web address. Download the image and give its path.")
    path = image_root / value.removeprefix("file://")
    if not path.is_file():
        raise UserError(f"{origin}: no image file {path}. Correct the path, give the folder of the images as image_root, or drop the row.")
    return path


def _from_data_uri(uri: str, origin: str) -> bytes:
    head, _, body = uri.partition(",")
    try:
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except binascii.Error as error:
        raise UserError(f"{origin}: a data: URI is not valid base64 ({error}). Write it again from the image.") from error


def _strings(value: Any, key: str, origin: str) -> tuple[str, ...]:
    """`value` as strings: one, or a list of them; numbers are written out."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    wrong = next((item for item in values if isinstance(item, bool) or not isinstance(item, str | int | float)), None)
    if wrong is not None:
        raise UserError(f"{origin}: '{key}' is {_shown(wrong)}. A string or a list of strings is wanted.")
    return tuple(str(item) for item in values)


def _string(value: Any, key: str, origin: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{origin}: '{key}' is {_shown(value)}. A string is wanted.")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
