"""The files of one expert: its adapter in PEFT's format, and what routes to it. It knows no manifest."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from alula.errors import UserError
from alula.files import read_tensors, sha256, write_tensors
from alula.mixture import Mixtures
from alula.peft_format import CONFIG, TENSORS, adapted, check_fit, header, read_pairs, write_adapter
from alula.pool.renaming import check_there, rename

ROUTER = "router.safetensors"


def write_expert(mixtures: Mixtures, name: str, folder: Path, *, base_name: str) -> tuple[str, ...]:
    """Writes an expert and gives the names of its files."""
    write_adapter(mixtures, name, folder, base_name=base_name)
    return (CONFIG, TENSORS, *write_router(mixtures, name, folder / ROUTER))


def write_router(mixtures: Mixtures, name: str, path: Path) -> tuple[str, ...]:
    """Writes what routes to an expert, or to the base model, and gives the name of the file; none where nothing does."""
    tensors = mixtures.router_tensors(name)
    if not tensors:
        return ()
    write_tensors(path, tensors)
    return (path.name,)


def read_expert(mixtures: Mixtures, name: str, folder: Path, *, files: Collection[str], renamed: Mapping[str, str]) -> None:
    """Adds the expert in `folder` under the model's present names of modules.

    Args:
        files: the names of its files; no other is read.

    Raises:
        UserError: layers or routers that the model does not have, shapes of another model, or damaged files.
    """
    paths = {path: rename(path, renamed) for path in adapted(folder)}
    check_there(paths.values(), mixtures.sites, what=folder)
    check_fit(mixtures, folder, paths)
    pairs, scales = read_pairs(folder)
    renamed_scales = {paths[path]: scale for path, scale in scales.items()}
    mixtures.adopt(name, {paths[path]: pair for path, pair in pairs.items()}, scales=renamed_scales)
    read_router(mixtures, name, folder, files=files, renamed=renamed)


def read_router(mixtures: Mixtures, name: str, folder: Path, *, files: Collection[str], renamed: Mapping[str, str]) -> None:
    """Takes back what routes to an expert, or to the base model, where such a file is among `files`.

    Raises:
        UserError: a damaged file, or one of another model.
    """
    if ROUTER not in files:
        return
    found = read_tensors(folder / ROUTER)
    try:
        mixtures.restore_router(name, {_renamed(key, renamed): tensor for key, tensor in found.items()})
    except UserError as error:
        raise UserError(f"{folder / ROUTER}: {error} If another version of transformers renamed its modules: alula remap.") from error


def routed(folder: Path, files: Collection[str]) -> set[str]:
    """The modules that the file of routers among `files` speaks of; no tensor is read."""
    keys = header(folder / ROUTER) if ROUTER in files else {}
    return {key.partition(".")[2].rpartition(".")[0] for key in keys if not key.startswith("prompt.")}


def digests(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of some files of a folder."""
    return {file: sha256(folder / file) for file in files}


def _renamed(key: str, renamed: Mapping[str, str]) -> str:
    """``gate.<module>.<tensor>`` with the module's present name; ``prompt.<layer>.<tensor>`` names no module."""
    kind, dot, rest = key.partition(".")
    return key if kind == "prompt" else f"{kind}{dot}{rename(rest, renamed)}"
