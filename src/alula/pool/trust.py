"""What a folder must show before it is believed: all files there, none outside of it, none damaged, none absurdly large."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from alula.errors import UserError
from alula.files import sha256
from alula.peft_format import few, header
from alula.pool.manifest import MANIFEST, inside, read_small_json

ROOM = 2**30
"""Bytes that a file may have whatever the model."""
WIDTH = 2**16
"""What a size in the configuration of learners may be whatever their tensors."""


def listed(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every file that a manifest names, by its path in the pool, with its SHA-256."""
    yield from ((f"base/{file}", digest) for file, digest in manifest["base"].get("files", {}).items())
    for kind in ("experts", "learners"):
        for entry in manifest[kind]:
            yield from ((f"{kind}/{entry['name']}/{file}", digest) for file, digest in entry["files"].items())


def check_present(folder: Path, manifest: Mapping[str, Any], *, root: Path) -> None:
    """Refuses a pool that was copied half-way, or whose files are links to elsewhere.

    Args:
        root: where links may lead: the folder itself, or the hub's cache for a pool that was downloaded.

    Raises:
        UserError: with the files that are missing.
    """
    names = [name for name, _ in listed(manifest)]
    for name in (MANIFEST, *names):
        inside(folder / name, root=root)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"The pool {folder} is not whole: {len(missing)} of the {len(names)} files that {MANIFEST} names are missing: "
            f"{few(missing)}. Copy the whole folder again."
        )


def check_files(folder: Path, files: Mapping[str, str]) -> None:
    """Refuses damaged files.

    Raises:
        UserError: with their names.
    """
    wrong = [file for file, digest in files.items() if not (folder / file).is_file() or sha256(folder / file) != digest]
    if wrong:
        names = ", ".join(str(folder / file) for file in wrong)
        verb = "is" if len(wrong) == 1 else "are"
        raise UserError(f"{names} {verb} missing or not what was saved. Restore from a copy, or remove the expert.")


def check_size(path: Path, model: nn.Module) -> Path:
    """`path`, if it is no larger than the base model or than `ROOM`; safetensors holds no more tensors than the file has bytes.

    Raises:
        UserError: it is larger.
    """
    size = path.stat().st_size
    limit = max(ROOM, sum(value.numel() * value.element_size() for value in model.parameters()))
    if size > limit:
        raise UserError(f"{path} has {size:,} bytes, more than the base model itself ({limit:,}). Nothing was read: do not use this pool.")
    return path


def check_widths(config: Path, tensors: Path) -> None:
    """Refuses learners whose configuration asks for more than their file holds: it is allocated before they are read.

    Raises:
        UserError: with the size.
    """
    asked, limit = read_small_json(config), max((size for shape in header(tensors).values() for size in shape), default=0)
    for name, size in asked.items() if isinstance(asked, dict) else ():
        if isinstance(size, int) and size > max(limit, WIDTH):
            raise UserError(f"{config} asks for {name} {size:,}, but {tensors.name} holds no such tensor. Do not use this pool.")
