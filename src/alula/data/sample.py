"""One type for every example: image-text, text-only, interleaved, several images. It knows no model."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from alula.data.pixels import UNREADABLE, as_rgb
from alula.errors import UserError, counted

ImageSource = Image.Image | bytes | Path
PLACEHOLDER = "<image>"
Read = TypeVar("Read")


class BadRow(UserError):
    """A row that cannot be learnt from.

    Args:
        kind: what is wrong with it, in a word or two by which such rows are counted.
    """

    def __init__(self, message: str, *, kind: str = "form") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. `role` is system, user or assistant; each ``<image>`` in `content` stands for the sample's next image."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A conversation whose last assistant turn is what a model should say.

    Attributes:
        options: candidate answers where the task is ranked; empty otherwise.
        accepted: further answers that count as right.
        origin: where it came from (``file.jsonl:12``), for errors.
        language: ISO 639-1 code of the question.

    Example:
        >>> sample = Sample.ask("What is the capital of Kenya?", "Nairobi")
        >>> sample.answer, len(sample.images)
        ('Nairobi', 0)
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = ()
    options: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()
    origin: str = ""
    language: str = "en"

    def __post_init__(self) -> None:
        where = self.origin or self.id
        found = sum(message.content.count(PLACEHOLDER) for message in self.messages)
        if found != len(self.images):
            raise BadRow(
                f"{where}: {counted(found, repr(PLACEHOLDER) + ' placeholder')} but {counted(len(self.images), 'image')}. "
                f"Write one '{PLACEHOLDER}' where each image belongs, or none at all to put them first.",
                kind="placeholders",
            )
        if not self.messages or self.messages[-1].role != "assistant":
            message = f"{where}: the last message must be the assistant's. Add the answer that is to be learnt."
            raise BadRow(message, kind="no answer")
        if not self.answer.strip():
            message = f"{where}: the answer is empty. Give the text that is to be learnt, or drop the row."
            raise BadRow(message, kind="empty answer")

    @classmethod
    def ask(cls, question: str, answer: str, *, images: tuple[ImageSource, ...] = (), **fields: Any) -> "Sample":
        """One question (its images first) and one answer."""
        asked = Message(role="user", content=f"{PLACEHOLDER}\n" * len(images) + question)
        fields.setdefault("id", question)
        return cls(messages=(asked, Message(role="assistant", content=answer)), images=images, **fields)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last assistant turn."""
        return self.messages[-1].content

    @property
    def references(self) -> tuple[str, ...]:
        """Every answer that counts as right."""
        return (self.answer, *self.accepted)

    @property
    def question(self) -> str:
        """The last user turn without placeholders."""
        asked = [message.content for message in self.prompt if message.role == "user"]
        return asked[-1].replace(PLACEHOLDER, "").strip() if asked else ""

    def open_images(self) -> list[Image.Image]:
        """The images as RGB, upright.

        Raises:
            BadRow: an image is missing or broken.
        """
        return [self._read(source, _opened) for source in self.images]

    def image_bytes(self) -> list[bytes]:
        """What is stored of each image: the bytes of a file, of a picture in memory its pixels.

        Raises:
            BadRow: a file is missing or cannot be read.
        """
        return [self._read(source, _stored) for source in self.images]

    def _read(self, source: ImageSource, read: Callable[[ImageSource], Read]) -> Read:
        where = self.origin or self.id
        try:
            return read(source)
        except FileNotFoundError:
            raise BadRow(
                f"{where}: no image file {source!s}. Correct the path (relative paths start at the data file's folder) or drop the row.",
                kind="missing image",
            ) from None
        except UNREADABLE as error:
            name = source if isinstance(source, Path) else "the embedded image"
            message = f"{where}: {name} cannot be read as an image ({error}). Replace the file or drop the row."
            raise BadRow(message, kind="broken image") from error


def _opened(source: ImageSource) -> Image.Image:
    if isinstance(source, Image.Image):
        return as_rgb(source)
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
        return as_rgb(opened)


def _stored(source: ImageSource) -> bytes:
    if isinstance(source, Image.Image):
        return f"{source.mode} {source.size}".encode() + source.tobytes()
    return source if isinstance(source, bytes) else source.read_bytes()
