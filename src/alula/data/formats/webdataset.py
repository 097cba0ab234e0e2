"""WebDataset: a tar whose members with one key (``0001.jpg``, ``0001.json``) are one row.

Not read by ``datasets.load_dataset("webdataset")``: it refuses rows of different members, so text-only rows beside rows
with images, and drops what the first five rows do not have without a word (datasets 5.2).
"""

import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
                members = ((*_split(member.name), archive.extractfile(member)) for member in archive if member.isfile())
                named = ((key, field, content.read()) for key, field, content in members if field and content)
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


def _row(members: dict[str, bytes], key: str, origin: str) -> dict[str, Any]:
    pictures = {field: content for field, content in members.items() if field.rpartition(".")[2] in IMAGES}
    try:
        texts = [content.decode() for field, content in members.items() if field in TEXTS]
        row = json.loads(members["json"]) if "json" in members else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        message = f"{origin}: the text of '{key}' is not valid ({error}). Write UTF-8 text, and JSON into .json members."
        raise BadRow(message, kind="json") from error
    if not isinstance(row, dict):
        raise BadRow(f"{origin}: '{key}.json' holds a {type(row).__name__}, an object with keys is wanted. Write the archive again.")
    row = {name: value for name, value in row.items() if value is not None}
    if set(row) <= {"id"} and len(texts) == 1:
        row |= {"question": "", "answer": texts[0]}
    named = row.pop("images", None) or row.pop("image", None) or list(pictures)
    row.pop("image", None)
    names = [named] if isinstance(named, str) else named
    return {"id": key, **row, "images": [_content(name, pictures, key) for name in names]}


def _content(name: Any, pictures: dict[str, bytes], key: str) -> Any:
    """The bytes of the member that `name` names; `name` itself where it names none."""
    if not isinstance(name, str):
        return name
    return pictures.get(name.lower(), pictures.get(_split(name)[1], name) if _split(name)[0] in (key, Path(key).name) else name)
