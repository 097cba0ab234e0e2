"""What a row calls an image -> where its pixels are. It opens no image."""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image

from alula.data.sample import BadRow, ImageSource

ROOTS = ("", "datasets", "cl_dataset", "images")
"""Beside or above a data file: where CoIN (``cl_dataset``) and UCIT (``datasets``) keep the images of all their tasks."""
NUM_PARENTS = 3


def image_roots(path: Path, *, root: Path | str | None) -> tuple[Path, ...]:
    """The folders that relative image paths of the data file `path` may start at, the first in which the image is being taken.

    Args:
        root: the one folder; None: the folder of the file, else one of `ROOTS` in it or in a folder up to three above it.
    """
    if root is not None:
        return (Path(root),)
    here = path.resolve().parent
    others = [above / name for above in (here, *list(here.parents)[:NUM_PARENTS]) for name in ROOTS]
    return (path.parent, *others[1:])


def image_source(value: Any, *, origin: str, roots: Sequence[Path]) -> ImageSource:
    """Where the image is, as `Sample` wants it; a path is checked for existence only.

    Args:
        value: a path, a ``data:`` or ``file:`` address, bytes, a picture, or ``{"bytes", "path"}`` or ``{"url"}`` around one.
        roots: as `image_roots` gives them.

    Raises:
        BadRow: nothing of that kind, no such file, a web address, or base64 that is none.
    """
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", "url", "path", "image") if value.get(key)), None)
    if isinstance(value, bytes | Image.Image):
        return value
    if not isinstance(value, str) or not value:
        raise BadRow(f"{origin}: an image is {shown(value)}. A path, a data: URI or image bytes are wanted.")
    if value.startswith("data:"):
        return _from_data_uri(value, origin)
    if value.startswith(("http://", "https://")):
        raise BadRow(f"{origin}: {value} is a web address. Download the image and give its path.", kind="web image")
    name = value.removeprefix("file://")
    found = next((root / name for root in roots if (root / name).is_file()), None)
    if found is None:
        remedy = "Correct the path, give the folder of the images as image_root, or drop the row."
        raise BadRow(f"{origin}: no image file {roots[0] / name}. {remedy}", kind="missing image")
    return found


def _from_data_uri(uri: str, origin: str) -> bytes:
    head, _, body = uri.partition(",")
    try:
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except binascii.Error as error:
        message = f"{origin}: a data: URI is not valid base64 ({error}). Write it again from the image."
        raise BadRow(message, kind="broken image") from error


def shown(value: Any) -> str:
    """A value in a message: its type and as much of it as fits."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
