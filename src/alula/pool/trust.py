"""What a folder must show before it is believed: every file that is read is named, there, as it was saved, and not absurdly large."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from alula.errors import UserError
from alula.files import sha256
from alula.learner_format import CONFIG as LEARNER_CONFIG
from alula.learner_format import TENSORS as LEARNER_TENSORS
from alula.peft_format import CONFIG, TENSORS, few
from alula.pool.manifest import LARGEST, MANIFEST

NEEDED = {"experts": (CONFIG, TENSORS), "learners": (LEARNER_CONFIG, LEARNER_TENSORS)}
"""What a manifest must name of each; whatever else is read is read where it is named."""
ROOM = 2**30
"""Bytes that a file may have whatever the model."""


def listed(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every file that a manifest names, by its path in the pool, with its SHA-256."""
    yield from ((f"base/{file}", digest) for file, digest in manifest["base"].get("files", {}).items())
    for kind in NEEDED:
        for entry in manifest[kind]:
            yield from ((f"{kind}/{entry['name']}/{file}", digest) for file, digest in entry["files"].items())


def check_present(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses a pool that was copied half-way, or that would have files read which nobody can check.

    Raises:
        UserError: with the files that are missing, or that the manifest does not name.
    """
    names = [name for name, _ in listed(manifest)]
    needed = {f"{kind}/{entry['name']}/{file}" for kind, files in NEEDED.items() for entry in manifest[kind] for file in files}
    if unnamed := sorted(needed - set(names)):
        raise UserError(
            f"{folder / MANIFEST} does not name {few(unnamed)}, so nobody can tell whether they are what was saved. "
            "No alula writes this: restore the file from a copy, or do not use this pool."
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"The pool {folder} is not whole: {len(missing)} of the {len(names)} files that {MANIFEST} names are missing: "
            f"{few(missing)}. Copy the whole folder again."
        )


def check_files(folder: Path, files: Mapping[str, str], *, largest: int | None = None) -> None:
    """Refuses damaged files, and unread those that are absurdly large.

    Args:
        largest: bytes that a file of tensors may have (see `largest_file`); None: any number, where no tensor is read whole.

    Raises:
        UserError: with their names.
    """
    wrong = []
    for file, digest in files.items():
        path, limit = folder / file, largest if file.endswith(".safetensors") else LARGEST
        if path.is_file() and limit is not None and path.stat().st_size > limit:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; {limit:,} are the most. Nothing was read: do not use this pool.")
        if not path.is_file() or sha256(path) != digest:
            wrong.append(str(path))
    if wrong:
        verb = "is" if len(wrong) == 1 else "are"
        raise UserError(f"{', '.join(wrong)} {verb} missing or not what was saved. Restore from a copy, or remove the expert.")


def largest_file(model: nn.Module) -> int:
    """Bytes that a file of tensors for `model` may have: as many as it has itself, or `ROOM`; safetensors holds no more than its file."""
    return max(ROOM, sum(value.numel() * value.element_size() for value in model.parameters()))
