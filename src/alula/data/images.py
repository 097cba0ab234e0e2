"""What a row calls an image -> where its pixels are. It opens no image."""

import base64
import os.path
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

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


def image_source(given: Any, *, origin: str, roots: Sequence[Path]) -> ImageSource:
    """Where the image is, as `Sample` wants it; a path is checked for existence only.

    Args:
        given: a path, a ``data:`` or ``file:`` address, bytes, a picture, or ``{"bytes", "path"}`` or ``{"url"}`` around one.
        roots: as `image_roots` gives them.

    Raises:
        BadRow: nothing of that kind, no such file, a web address, or base64 that is none.
    """
    value = next((given[key] for key in ("bytes", "url", "path", "image") if given.get(key)), None) if isinstance(given, dict) else given
    if isinstance(value, bytes | Image.Image):
        return value
    if not isinstance(value, str) or not value:
        raise BadRow(f"{origin}: an image is {shown(given)}. A path, a data: URI or image bytes are wanted.")
    scheme, _, rest = value.partition(":")
    if scheme.lower() == "data":
        return _from_data_uri(rest, origin)
    if scheme.lower() == "file":
        value = unquote(rest.removeprefix("//localhost").removeprefix("//"))
    elif rest.startswith("//"):
        message = f"{origin}: {value} is a web address. Download the image and give its path: nothing is fetched."
        raise BadRow(message, kind="web image")
    found = next((root / value for root in roots if os.path.isfile(root / value)), None)  # False for a name that no file can have
    if found is None:
        path = str(roots[0] / value)
        remedy = "Correct the path, give the folder of the images as image_root, or drop the row."
        if "." not in value:
            remedy += " If it is base64, write data:image/png;base64, in front of it."
        raise BadRow(f"{origin}: no image file {path if len(path) <= 300 else path[:300] + '...'}. {remedy}", kind="missing image")
    return found


def _from_data_uri(uri: str, origin: str) -> bytes:
    head, _, body = uri.partition(",")
    try:
        is_base64 = head.lower().endswith(";base64")
        return base64.b64decode("".join(body.split()), validate=True) if is_base64 else unquote_to_bytes(body)
    except ValueError as error:
        message = f"{origin}: a data: URI is not valid base64 ({error}). Write it again from the image."
        raise BadRow(message, kind="broken image") from error


def shown(value: Any) -> str:
    """A value in a message: its type and as much of it as fits."""
    return f"{type(value).__name__} {reprlib.repr(value)}"
