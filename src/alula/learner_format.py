"""Learners as a folder, in and out. It knows the file format, not the pool."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from alula.errors import UserError
from alula.files import read_json, read_tensors, write_json, write_tensors
from alula.learners import LearnerConfig, Learners, attach_learners

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


def read_learners(model: nn.Module, folder: Path | str) -> Learners:
    """Attaches the learners in a folder to the base model they were made for.

    What was trained with them is put in place, too, and `Learners.detach` takes it out again.

    Raises:
        UserError: no learners there, damaged files, or another base model; `model` is then as it was.
    """
    folder = Path(folder)
    learners = attach_learners(model, config=LearnerConfig.model_validate(read_json(folder / CONFIG)))
    try:
        learners.load(read_tensors(folder / TENSORS))
        if (folder / TRAINED).exists():
            learners.exchange(read_tensors(folder / TRAINED), origin=str(folder / TRAINED))
    except UserError:
        learners.detach()
        raise
    return learners
