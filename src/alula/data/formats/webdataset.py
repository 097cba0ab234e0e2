"""WebDataset: a tar whose members with one key (``0001.jpg``, ``0001.json``) are one row.

Not read by ``datasets.load_dataset("webdataset")``: it refuses rows of different members, so text-only rows beside rows
with images, and drops what the first five rows do not have without a word (datasets 5.2).
"""

import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alula.data.formats.json_value import only_value
from alula.data.formats.table import FORMATS, Format, Line
from alula.data.sample import BadRow
from alula.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
TEXTS = ("txt", "text", "caption")


@FORMATS.register("webdataset")
class WebDataset(Format):
    """Rows by their number from 1.

    ``.json`` is the row itself; its images are named by members (``0001.left.jpg``, or ``left.jpg`` alone), or all members that
    are images. A row of images and one text (``.txt``) is a caption.
    """

    endings = (".tar", ".tar.gz", ".tgz")

    def rows(self, path: Path) -> Iterator[Line]:
        """Member after member, of which those of one row are held."""
        try:
            with tarfile.open(path) as archive:
                members = ((*_split(member.name), member) for member in archive if not member.isdir())
                named = ((key, field, _content(archive, member)) for key, field, member in members if field)
                for number, (key, group) in enumerate(itertools.groupby(named, key=lambda member: member[0]), start=1):
                    origin = f"{path.name}:{number}"
                    try:
                        row: Any = _row({field: content for _, field, content in group}, key, origin)
                    except BadRow as error:
                        row = error
                    yield Line(origin=origin, row=row)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"{path} is not a whole tar file ({error}). Download or write it again.") from error


def _split(name: str) -> tuple[str, str]:
    """The key, and the rest of the file name after its first dot; no rest for hidden files."""
    folder, slash, file = name.rpartition("/")
    stem, _, field = file.partition(".")
    return f"{folder}{slash}{stem}", field.lower() if stem else ""


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """What is in `member`; None for a link."""
    content = archive.extractfile(member) if member.isfile() else None
    return content.read() if content else None


def _row(group: dict[str, bytes | None], key: str, origin: str) -> dict[str, Any]:
    members = {field: content for field, content in group.items() if content is not None}
    if link := next((field for field in group if field not in members), None):
        message = f"{origin}: '{key}.{link}' is a link, a file is wanted. Write the archive again: tar --dereference --hard-dereference."
        raise BadRow(message)
    pictures = {field: content for field, content in members.items() if field.rpartition(".")[2] in IMAGES}
    try:
        texts = [content.decode() for field, content in members.items() if field in TEXTS]
        row = only_value(members["json"].decode("utf-8-sig")) if "json" in members else {}
    except ValueError as error:
        message = f"{origin}: the text of '{key}' is not valid ({error}). Write UTF-8 text, and JSON into .json members."
        raise BadRow(message, kind="json") from error
    if not isinstance(row, dict):
        raise BadRow(f"{origin}: '{key}.json' holds a {type(row).__name__}, an object with keys is wanted. Write the archive again.")
    row = {name: value for name, value in row.items() if value is not None}
    if set(row) <= {"id"} and len(texts) == 1:
        if not pictures:
            message = f"{origin}: the caption '{key}' has no image. Add the image beside it, or write prose as a .json with 'text'."
            raise BadRow(message, kind="missing image")
        row |= {"question": "", "answer": texts[0]}
    column = next((name for name in ("image", "images") if row.get(name)), "images")
    named = row.get(column) or list(pictures)
    return {"id": key, **row, column: [_named(value, pictures, key) for value in (named if isinstance(named, list) else [named])]}


def _named(value: Any, pictures: dict[str, bytes], key: str) -> Any:
    """The bytes of the member that `value` names; `value` itself where it names none."""
    name = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
    if not isinstance(name, str):
        return value
    return pictures.get(name.lower(), pictures.get(_split(name)[1], name) if _split(name)[0] in (key, Path(key).name) else name)
