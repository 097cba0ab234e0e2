"""What may stand in ``pool.json``, and nothing else: pools come from strangers, too. It knows no torch."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alula.errors import UserError
from alula.files import read_json

MANIFEST = "pool.json"
FORMAT = 1
LARGEST = 64 * 2**20
"""Bytes of a manifest, or of any JSON beside it, that are read at most."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=4096)]
ModulePath = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Base(_Strict):
    """The base model.

    Attributes:
        values: a fingerprint without the names of parameters: the same model under the names of another transformers.
        files: what routes to the base model.
        renamed: see `Entry`.
    """

    name: Line
    fingerprint: Digest
    values: Digest | None = None
    files: dict[FileName, Digest] = Field(default_factory=dict)
    renamed: dict[ModulePath, ModulePath] = Field(default_factory=dict)


class About(BaseModel):
    """What an expert was trained on and how it scored; more may stand there."""

    model_config = ConfigDict(extra="allow", frozen=True)

    samples: int | None = None
    before: float | None = None
    after: float | None = None
    test_samples: int | None = None
    metric: Line | None = None
    cost: dict[str, Any] = Field(default_factory=dict)


class Entry(_Strict):
    """One expert, or the learners after one task.

    Attributes:
        base: the fingerprint of the base model it was trained on.
        files: their SHA-256.
        renamed: from names of modules in the files to those of the model, see `Pool.remap`.
    """

    name: Name
    added: Line = ""
    base: Digest | None = None
    files: dict[FileName, Digest]
    about: About = Field(default_factory=About)
    renamed: dict[ModulePath, ModulePath] = Field(default_factory=dict)


class Manifest(_Strict):
    """A pool.

    Attributes:
        linears: names, no regular expression: matching one by a stranger can take for ever.
    """

    format: int
    base: Base
    linears: list[Line] | None = None
    layers: list[int] | None = None
    arm: Line
    experts: list[Entry]
    learners: list[Entry] = Field(default_factory=list)


def read_manifest(folder: Path | str, *, root: Path | None = None) -> dict[str, Any]:
    """The manifest of the pool in a folder, checked, with every optional key.

    Args:
        root: where links in the folder may lead; None: into the folder itself.

    Raises:
        UserError: no pool there, one of a newer format, or anything that no alula writes: a name or a link that leads out of the
            folder, an expert of another base model, the same name twice.
    """
    path = Path(folder) / MANIFEST
    check_links(path.parent, root=root)
    if not path.exists():
        raise UserError(f"No pool in {folder} ({MANIFEST} is missing). Make one with `alula learn --pool {folder} ...`.")
    raw = read_small_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} is not a pool's manifest: a {type(raw).__name__} came, an object is wanted. Restore it from a copy.")
    if raw.get("format") != FORMAT:
        raise UserError(f"{path} has format {raw.get('format')!r:.40}; this alula reads {FORMAT}. Install a newer alula.")
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(_explain(problem, path) for problem in error.errors()[:5])) from error
    for kind, entries in (("expert", manifest.experts), ("learners", manifest.learners)):
        _check_entries(kind, entries, manifest.base, path)
    return {"linears": None, "layers": None, "learners": []} | raw


def read_small_json(path: Path) -> Any:
    """The JSON in a file that is small if it is ours.

    Raises:
        UserError: it is absurdly large, no file to read from, or no JSON.
    """
    if path.exists() and not (path.is_file() and path.stat().st_size <= LARGEST):
        raise UserError(f"{path} is no file of up to {LARGEST:,} bytes; alula writes a few thousand. Do not use this pool.")
    return read_json(path)


def inside(path: Path, *, root: Path) -> Path:
    """`path`, if it is really below `root`, links followed.

    Raises:
        UserError: it leads out.
    """
    real = os.path.realpath(path)  # unlike Path.resolve it takes links in a circle
    if not Path(real).is_relative_to(os.path.realpath(root)):
        raise UserError(f"{path} leads out of {root}, to {real}. A pool's files are in its folder: do not use this pool.")
    return path


def check_links(folder: Path, *, root: Path | None = None) -> None:
    """Refuses a folder with links to elsewhere, before anything is read or written through one.

    Args:
        root: where links may lead; None: into the folder itself.

    Raises:
        UserError: with the first such link.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if os.path.islink(path := os.path.join(place, name)):
                inside(Path(path), root=root or folder)


def _check_entries(kind: str, entries: list[Entry], base: Base, path: Path) -> None:
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: {kind} {', '.join(twice)} comes twice. Restore the file from a copy.")
    foreign = [entry.name for entry in entries if entry.base not in (None, base.fingerprint)]
    if foreign:
        raise UserError(
            f"{path}: {kind} {', '.join(foreign)} was trained on another base model than the pool's '{base.name}' "
            f"({base.fingerprint[:12]}). Take it out of the file; `alula adopt` takes in an adapter that fits."
        )


def _explain(problem: Any, path: Path) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    shown = "" if problem["type"] == "missing" else f" is {problem['input']!r:.80}"
    return f"{path}: '{place}'{shown}: {problem['msg']}. No alula writes this: restore the file from a copy, or do not use this pool."
