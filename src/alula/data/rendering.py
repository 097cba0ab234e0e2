"""Conversations to the text a model was trained on, and where in that text its own turns are. It tokenises nothing."""

from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import ProcessorMixin

from alula.data.sample import PLACEHOLDER, Message, Sample
from alula.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One assistant turn as character positions of the rendered text.

    Attributes:
        header: where the turn begins (``<|im_start|>assistant``).
        start: where its own text begins.
        content_end: where its own text ends.
        end: where its end-of-turn token ends.
    """

    header: int
    start: int
    content_end: int
    end: int

    def moved(self, by: int) -> "Turn":
        """The same turn after `by` characters were written before the text."""
        places = (self.header, self.start, self.content_end, self.end)
        header, start, content_end, end = (place + by for place in places)
        return Turn(header=header, start=start, content_end=content_end, end=end)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """The text of one row; each image still is the one mark that the chat template writes."""

    text: str
    turns: tuple[Turn, ...]


TEXT = "text"
"""The role of a message that is no turn of a conversation: written as it is, never a target."""


def is_prose(sample: Sample) -> bool:
    """Whether `sample` is running text: one assistant message that answers nothing."""
    return len(sample.messages) == 1


def is_plain(sample: Sample) -> bool:
    """Whether `sample` is written without a chat template: running text, or a document that opens with a `TEXT` message."""
    return is_prose(sample) or sample.messages[0].role == TEXT


def image_instructions(sample: Sample) -> list[str]:
    """For each image what the message says that it stands in; of one that is no turn, what the image's line says.

    So an image of a published few-shot prompt has its own question, and one alone on a line of a document the empty instruction, which
    a sentence encoder makes zeros of: all that stands around it is a target.

    Example:
        >>> image_instructions(Sample.ask("What is\\nthis?", "a cat", images=(b"",)))
        ['What is this?']
    """
    return [
        " ".join(part.replace(PLACEHOLDER, " ").split())
        for message in sample.messages
        for part in (message.content.splitlines() if message.role == TEXT else [message.content])
        for _ in range(part.count(PLACEHOLDER))
    ]


class ChatRenderer:
    """Renders samples with the chat template of `processor`.

    The placeholders become ``{"type": "image"}`` parts in the order in which they stand; line breaks beside them are
    dropped, because the template writes what its model wants there. A system message that the template refuses is put
    before the first user turn. A template that closes the last answer with no special token gets the tokenizer's
    end-of-sequence token there, or the model would never learn to stop.

    A plain sample gets no template: its messages follow one another, one space between them where neither brings white space,
    and each placeholder becomes the mark that the template writes for an image. Nothing is put after the last one.

    Raises:
        UserError: `processor` has no chat template.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        template = getattr(processor, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise UserError(
                f"{type(processor).__name__} has no chat template, so how this model writes a conversation is unknown. "
                "Set processor.chat_template to the Jinja template of the model's authors."
            )
        self._template = template
        self._tokenizer = processor.tokenizer
        added = processor.tokenizer.added_tokens_decoder.values()
        self._specials = {token.content for token in added if token.special} | set(self._tokenizer.all_special_tokens)

    def prompt(self, sample: Sample) -> str:
        """The turns before the last answer and the header of that answer.

        Raises:
            UserError: there are no such turns, or the template refuses them.
        """
        if is_prose(sample):
            raise UserError(f"{_name(sample)}: running text has no prompt to answer. Add a user message before it.")
        if is_plain(sample):
            return self._written(sample.prompt).text
        return self._render(sample, sample.prompt, opens_answer=True)

    def conversation(self, sample: Sample) -> Rendered:
        """The whole of `sample`; running text stays as it is.

        Raises:
            UserError: the template refuses the messages or changes an answer, or an assistant message holds an image.
        """
        if any(PLACEHOLDER in message.content for message in sample.messages if message.role == "assistant"):
            raise UserError(f"{_name(sample)}: an assistant message holds an image. Move '{PLACEHOLDER}' into a user message.")
        if is_plain(sample):
            return self._written(sample.messages)
        text = self._render(sample, sample.messages)
        turns: list[Turn] = []
        for i, message in enumerate(sample.messages):
            if message.role == "assistant":
                turns.append(self._turn(sample, i, text, after=turns[-1].end if turns else 0))
        return self._closed(text, turns)

    def _written(self, messages: tuple[Message, ...]) -> Rendered:
        """Messages without a template."""
        text, turns = "", []
        for message in messages:
            content = message.content.replace(PLACEHOLDER, self._mark()) if PLACEHOLDER in message.content else message.content
            gap = " " if text and not text[-1].isspace() and content and not content[0].isspace() else ""
            start, text = len(text) + len(gap), text + gap + content
            if message.role == "assistant":
                turns.append(Turn(header=start, start=start, content_end=len(text), end=len(text)))
        return Rendered(text=text, turns=tuple(turns))

    def _mark(self) -> str:
        """What the template writes for an image between two texts; where it puts images first, what it writes before one text."""
        between = self._apply((Message(role="user", content=f"first{PLACEHOLDER}second"),), False)
        mark = between.partition("first")[2].partition("second")[0].strip()
        if not mark:
            shown, bare = (self._apply((Message(role="user", content=f"{image}second"),), False) for image in (PLACEHOLDER, ""))
            mark = shown.partition("second")[0].removeprefix(bare.partition("second")[0]).strip()
        if not mark:
            raise UserError("The chat template writes no mark for an image, so none can stand in plain text. Use conversations.")
        return mark

    def _turn(self, sample: Sample, i: int, text: str, *, after: int) -> Turn:
        content = sample.messages[i].content.strip()
        header = start = after
        if i > 0:
            before = self._render(sample, sample.messages[:i])
            header = len(before) if text.startswith(before) else after
            opened = self._render(sample, sample.messages[:i], opens_answer=True)
            start = len(opened) if text.startswith(opened) else header
        found = text.find(content, start)
        if found < 0:
            raise UserError(
                f"{_name(sample)}: the chat template does not write the answer {content[:60]!r} as it is. "
                "Set a processor.chat_template that keeps assistant messages unchanged."
            )
        content_end = found + len(content)
        if text[start:found].strip():  # the template wrote more than a header there: only the answer's own text counts
            start = found
        whole = self._render(sample, sample.messages[: i + 1])
        return Turn(header=header, start=start, content_end=content_end, end=self._end(text, whole, content_end))

    def _end(self, text: str, whole: str, content_end: int) -> int:
        """Where the end-of-turn token after `content_end` ends; `whole` is the text up to and with this turn."""
        if text.startswith(whole):
            return max(content_end, len(whole.rstrip()))
        follows = [token for token in self._specials if text.startswith(token, content_end)]
        return content_end + max(map(len, follows), default=0)

    def _closed(self, text: str, turns: list[Turn]) -> Rendered:
        last, stop = turns[-1], self._tokenizer.eos_token
        if stop and not any(text.endswith(token, last.content_end, last.end) for token in self._specials):
            text = text[: last.end] + stop
            turns = [*turns[:-1], replace(last, end=len(text))]
        return Rendered(text=text, turns=tuple(turns))

    def _render(self, sample: Sample, messages: tuple[Message, ...], *, opens_answer: bool = False) -> str:
        try:
            return self._apply(messages, opens_answer)
        except TemplateError as error:
            if messages[0].role != "system" or len(messages) == 1:
                raise _refused(sample, error) from error
        try:
            return self._apply(_without_system(messages), opens_answer)
        except TemplateError as error:
            raise _refused(sample, error) from error

    def _apply(self, messages: tuple[Message, ...], opens_answer: bool) -> str:
        # The tokenizer's method, not the processor's: SmolVLM's touches a video processor that may be absent.
        return self._tokenizer.apply_chat_template(
            [{"role": message.role, "content": _parts(message.content)} for message in messages],
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=opens_answer,
        )


def _parts(content: str) -> list[dict[str, Any]]:
    """The typed parts of `content`: ``{"type": "image"}`` and ``{"type": "text", "text": ...}``."""
    pieces = content.split(PLACEHOLDER)
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        if i > 0:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if i + 1 < len(pieces):
            piece = piece.removesuffix("\n")
        if piece or len(pieces) == 1:
            parts.append({"type": "text", "text": piece})
    return parts


def _without_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    system, first, *rest = messages
    if first.role != "user":
        return (Message(role="user", content=system.content), first, *rest)
    return (replace(first, content=f"{system.content}\n\n{first.content}"), *rest)


def _refused(sample: Sample, error: TemplateError) -> UserError:
    roles = ", ".join(message.role for message in sample.messages)
    return UserError(f"{_name(sample)}: the chat template refuses the messages ({roles}): {error}. Change the roles of the row.")


def _name(sample: Sample) -> str:
    return sample.origin or sample.id
