"""The state of an unfinished stream on disk: JSON and safetensors, whole or not there. It knows no method and no loop."""

import importlib.metadata
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

from alula.errors import UserError
from alula.files import read_json, read_tensors, told_of, write_json, write_tensors
from alula.training.sharding import spread_like

logger = logging.getLogger(__name__)
LIBRARIES = ("torch", "transformers", "accelerate")
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, order=True)
class Place:
    """The next step to take; `task`, `stage` and `step` count from 0. Step 0 of stage 0 means: before the task begins."""

    task: int = 0
    stage: int = 0
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that a resumed run needs beside the recipe, the base model and the data.

    Random state is not among it: every step draws from a seed of its own (see order.py).

    Attributes:
        recipe: what makes the run this run; a checkpoint of another recipe is refused.
        num_rows: lines of losses.jsonl up to here.
        cost: of the task at `place`, or of the one before if `place` is a task's begin.
        trained: names of all parameters that ever had gradients.
        model: the changed tensors of the model, by name.
        method: the method's own tensors.
        optimizer: AdamW's moments and step counts as ``<parameter>/exp_avg`` ...; empty at a stage's begin.
    """

    recipe: dict
    place: Place
    num_rows: int
    cost: dict
    trained: tuple[str, ...]
    model: Tensors = field(repr=False)
    method: Tensors = field(repr=False)
    optimizer: Tensors = field(repr=False)


def versions() -> dict[str, str]:
    """The installed versions of the libraries that numbers depend on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def save(folder: Path, checkpoint: Checkpoint) -> None:
    """Puts `checkpoint` into `folder`; the one that was there stays until the new one is whole.

    Raises:
        UserError: the disk is full or the folder cannot be written; the former checkpoint is unchanged.
    """
    part, old = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    groups = {"model": checkpoint.model, "method": checkpoint.method, "optimizer": checkpoint.optimizer}
    tensors = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
    state = {
        "recipe": checkpoint.recipe,
        "place": asdict(checkpoint.place),
        "num_rows": checkpoint.num_rows,
        "cost": checkpoint.cost,
        "trained": list(checkpoint.trained),
        "num_tensors": len(tensors),
        "versions": versions(),
    }
    shutil.rmtree(part, ignore_errors=True)
    write_tensors(part / "tensors.safetensors", tensors)
    write_json(part / "state.json", state)
    # A folder cannot be replaced in one move: between the two moves, `load` finds the former one under .old.
    shutil.rmtree(old, ignore_errors=True)
    with told_of(folder):
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, *, recipe: dict) -> Checkpoint | None:
    """The checkpoint in `folder`, on the CPU; None if there is none.

    Raises:
        UserError: it is damaged, or was written by another recipe.
    """
    old = folder.with_name(folder.name + ".old")
    source = folder if folder.exists() or not old.exists() else old
    if not source.exists():
        return None
    remedy = f"Delete the folder {source} to start this cell anew, or restore it from a copy."
    try:
        state = read_json(source / "state.json")
        tensors = read_tensors(source / "tensors.safetensors")
    except UserError as error:
        raise UserError(f"The checkpoint is damaged: {error} {remedy}") from error
    if not isinstance(state, dict) or state.get("num_tensors") != len(tensors):
        raise UserError(f"The checkpoint is damaged: {source}/state.json does not fit tensors.safetensors beside it. {remedy}")
    if state["recipe"] != recipe:
        raise UserError(f"{source} belongs to another recipe: {_difference(state['recipe'], recipe)}. Undo that, or: {remedy}")
    if state["versions"] != versions():
        changes = _difference(state["versions"], versions())
        logger.warning("Resuming with other libraries (%s): the numbers may differ in the last digits.", changes)
    return Checkpoint(
        recipe=state["recipe"],
        place=Place(**state["place"]),
        num_rows=state["num_rows"],
        cost=state["cost"],
        trained=tuple(state["trained"]),
        **{group: _group(tensors, group) for group in ("model", "method", "optimizer")},
    )


def _group(tensors: Tensors, group: str) -> Tensors:
    prefix = f"{group}/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _difference(stored: dict, wanted: dict) -> str:
    keys = [key for key in {**stored, **wanted} if stored.get(key) != wanted.get(key)]
    return ", ".join(f"{key} was {stored.get(key)!r}, is {wanted.get(key)!r}" for key in keys)


def optimizer_tensors(optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> Tensors:
    """The optimizer's state by parameter name."""
    return {f"{name}/{key}": value for name, parameter in parameters.items() for key, value in optimizer.state.get(parameter, {}).items()}


def load_optimizer(optimizer: Optimizer, parameters: dict[str, nn.Parameter], tensors: Tensors) -> None:
    """Gives `optimizer`, made over `parameters` in any order and groups, the state that `optimizer_tensors` took."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {names[id(parameter)]: place for place, parameter in enumerate(ordered)}
    state: dict[int, Tensors] = {}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        state.setdefault(places[name], {})[key] = spread_like(parameters[name], value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
