"""Learners as a folder, in and out. It knows the file format, not the pool."""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor, nn

from alula.errors import UserError
from alula.files import read_json, read_tensors, write_json, write_tensors
from alula.learners import LearnerConfig, Learners, attach_learners
from alula.peft_format import check_shapes

CONFIG, TENSORS, TRAINED = "learners.json", "learners.safetensors", "trained.safetensors"
"""How they sit in the model, their tensors, and what else was trained with them (connector, backbone)."""


def write_learners(learners: Learners, folder: Path | str, *, trained: Mapping[str, Tensor] | None = None) -> tuple[str, ...]:
    """Writes the learners of a model.

    Args:
        trained: other parameters that were trained with them, by their path in the model that carries the learners.

    Returns:
        the names of the files.
    """
    folder = Path(folder)
    write_tensors(folder / TENSORS, learners.tensors())
    extra = {name: tensor.detach() for name, tensor in (trained or {}).items()}
    if extra:
        write_tensors(folder / TRAINED, extra)
    write_json(folder / CONFIG, learners.config.model_dump(mode="json"))
    return (CONFIG, TENSORS, *((TRAINED,) if extra else ()))


def read_learners(model: nn.Module, folder: Path | str, *, files: Collection[str]) -> Learners:
    """Attaches the learners in a folder to the base model they were made for; what is refused leaves it as it was.

    What was trained with them is put in place, too, and `Learners.detach` takes it out again.

    Args:
        files: the names that `write_learners` gave; no other file is read.

    Raises:
        UserError: no learners there, damaged files, another base model, or a configuration that no alula writes.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    _check_shapes(model, config, folder / TENSORS)
    learners = attach_learners(model, config=config)
    with ExitStack() as undo:
        undo.callback(learners.detach)
        learners.load(read_tensors(folder / TENSORS))
        if TRAINED in files:
            learners.exchange(read_tensors(folder / TRAINED), origin=str(folder / TRAINED))
        undo.pop_all()
    return learners


def _read_config(path: Path) -> LearnerConfig:
    try:
        return LearnerConfig.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{path}: {place}: {first['msg']}. No alula writes this: restore the file from a copy.") from error


def _check_shapes(model: nn.Module, config: LearnerConfig, path: Path) -> None:
    """Refuses a configuration that asks for other tensors than the file has: they are allocated before it is read.

    Learners of width 1 cost next to nothing and have every name; only the sizes that the configuration names differ.
    """
    narrow = attach_learners(model, config=config.model_copy(update={"rank": 1, "positions": 1}))
    asked = {name: _widened(name, list(tensor.shape), config) for name, tensor in narrow.tensors().items()}
    narrow.detach()
    check_shapes(path, asked, config=CONFIG)


def _widened(name: str, shape: list[int], config: LearnerConfig) -> list[int]:
    if name.endswith(".A"):
        return [config.rank, shape[1]]
    if name.endswith(".B"):
        return [shape[0], config.rank]
    return [shape[0], config.positions] if config.router == "position" and name.endswith("gate.weight") else shape
