"""From what a recipe or a command line names to models, and to tasks with their samples."""

from collections.abc import Mapping
from dataclasses import replace
from inspect import Parameter, signature
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from alula.config import ModelChoice, Recipe, TaskChoice
from alula.data.choices import read_choice
from alula.data.readers import check_images, read_test
from alula.data.stream import Stream, Task
from alula.data.tasks import load_task
from alula.errors import UserError, nearest
from alula.experts.upcycling import upcycle
from alula.models import load_model
from alula.models.composition import EMBEDDED, compose, plan_composition
from alula.models.loading import DTYPES, FOUR_BIT, find_device
from alula.running.cell import limited


def load_choice(choice: TaskChoice) -> Task:
    """The task a recipe names: built-in, or read from the user's file.

    Raises:
        UserError: an unknown built-in task, or data that cannot be used (with file and line), images included.
    """
    if choice.is_built_in:
        return load_task(choice.name, train_size=choice.train_size, test_size=choice.test_size)
    task = limited(read_choice(choice), train_size=choice.train_size, test_size=choice.test_size)
    check_images(task.train, task.test)  # now, not in the middle of the training
    return task


def load_to_score(choice: TaskChoice) -> Task:
    """As `load_choice`, but every row of a user's file is scored; a folder's test rows are.

    Raises:
        UserError: as `load_choice`.
    """
    if choice.path is None or choice.path.is_dir():
        return load_choice(choice)
    task = read_test(choice.name, choice.path, scoring=choice.scoring, **choice.reading)
    check_images(task.test)
    return task


def load_stream(recipe: Recipe) -> Stream:
    """The recipe's stream."""
    base = tuple(replace(load_choice(choice), is_base=True) for choice in recipe.base_tasks)
    return Stream(tasks=tuple(load_choice(choice) for choice in recipe.tasks), base_tasks=base)


def load_chosen(recipe: Recipe, *, device: str | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The recipe's model, the same at every call, and its processor.

    Args:
        device: as in `load_model`.

    Raises:
        UserError: there is no such model, or its parts do not fit.
    """
    chosen = recipe.model
    if isinstance(chosen, str):
        return load_model(chosen, dtype=recipe.dtype, device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        if chosen.encoder is None:
            model, processor = load_model(chosen.backbone, dtype=recipe.dtype, device="cpu")
        else:
            model, processor = compose(**_parts(chosen), dtype=DTYPES.get(recipe.dtype, torch.float32))  # type: ignore[assignment]
        if chosen.upcycle is not None:
            upcycle(model, **chosen.upcycle)
    return model.to(find_device(device)).eval(), processor  # type: ignore[arg-type]


def check_model(recipe: Recipe) -> None:
    """Refuses a composition that does not fit, before a weight is loaded; of other models nothing is known before.

    Raises:
        UserError: as `alula.models.composition.compose`, or a keyword that is not known.
    """
    chosen = recipe.model
    if isinstance(chosen, str):
        return
    for what, given, function in (("options", chosen.options, compose), ("upcycle", chosen.upcycle or {}, upcycle)):
        known = [name for name, one in signature(function).parameters.items() if one.kind is Parameter.KEYWORD_ONLY and name != "dtype"]
        for key in given:
            if key not in known:
                raise UserError(f"Unknown key 'model.{what}.{key}'. {nearest(key, known)}")
    if chosen.encoder is not None:
        if recipe.dtype == FOUR_BIT:
            raise UserError("dtype 4bit came for a model out of parts, which are loaded one by one. Take 4bit out, or name a whole model.")
        plan_composition(**{key: value for key, value in _parts(chosen).items() if key != "chat_template"})


def _parts(choice: ModelChoice) -> dict[str, Any]:
    """Keywords of `compose`."""
    parts = {"encoder": _with_weights(choice.encoder), "connector": _with_weights(choice.connector)}
    return {"backbone": choice.backbone, **parts, **choice.options}


def _with_weights(part: Any) -> Any:
    """The part, with the place of the embedded default's weights where its name stands."""
    if isinstance(part, list):
        return [_with_weights(one) for one in part]
    if not isinstance(part, Mapping) or part.get("weights") != EMBEDDED:
        return part
    from alula.models.smol import prepare_smol

    return {**part, "weights": str(prepare_smol() / "model.safetensors")}
