"""From what a recipe or a command line names to models, and to tasks with their samples."""

from dataclasses import replace
from inspect import Parameter, signature
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from alula.config import ModelChoice, Recipe, TaskChoice
from alula.data.choices import read_choice
from alula.data.documents import SOURCE, check_kinds
from alula.data.readers import check_images, find_splits, read_test
from alula.data.stream import Stream, Task
from alula.data.tasks import TASKS, load_task
from alula.errors import UserError, nearest
from alula.experts.upcycling import check_upcycling, upcycle
from alula.models import load_model
from alula.models.composition import compose, plan_composition
from alula.models.loading import DTYPES, FOUR_BIT, find_device
from alula.running.cell import limited


def load_choice(choice: TaskChoice) -> Task:
    """The task a recipe names: built-in, or read from the user's file.

    Raises:
        UserError: an unknown built-in task, or data that cannot be used (with file and line), images included.
    """
    if choice.is_built_in:
        return _scored(load_task(choice.name, train_size=choice.train_size, test_size=choice.test_size), choice)
    task = limited(read_choice(choice), train_size=choice.train_size, test_size=choice.test_size)
    check_images(task.train, task.test)  # now, not in the middle of the training
    return task


def _scored(task: Task, choice: TaskChoice) -> Task:
    """A built-in task with the scoring that the recipe asks for in place of its own."""
    if choice.scoring in ("exact_match", task.scoring):  # the first is what a recipe says that says nothing
        return task
    if choice.scoring != "bits_per_byte":
        raise UserError(
            f"Task '{choice.name}': scoring '{choice.scoring}' came, but it is scored by {task.scoring}. "
            "A built-in task takes bits_per_byte besides its own; leave scoring away, or give data of your own."
        )
    return replace(task, scoring=choice.scoring)


def load_to_score(choice: TaskChoice) -> Task:
    """As `load_choice`, but nothing learns from it: of a user's data without test rows of its own every row is scored.

    Raises:
        UserError: as `load_choice`.
    """
    if choice.path is None or choice.test_path is not None:
        return load_choice(choice)
    path, test_path = find_splits(choice.path) if choice.path.is_dir() else (choice.path, None)
    if test_path is not None:
        return load_choice(choice)
    task = limited(read_test(choice.name, path, scoring=choice.scoring, **choice.reading), train_size=None, test_size=choice.test_size)
    check_images(task.test)
    return task


def load_stream(recipe: Recipe) -> Stream:
    """The recipe's stream; nothing learns from base tasks (see `load_to_score`)."""
    base = tuple(replace(load_to_score(choice), is_base=True) for choice in recipe.base_tasks)
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


def check_tasks(recipe: Recipe) -> None:
    """Refuses names that no built-in task and no source of a blend has, before any data are read.

    Raises:
        UserError: with the nearest known.
    """
    for choice in (*recipe.tasks, *recipe.base_tasks):
        sources = [source.name for source in choice.blend if source.name is not None]
        check_kinds(*(name.removeprefix(SOURCE) for name in sources if name.startswith(SOURCE)))
        for name in [choice.name] if choice.is_built_in else [name for name in sources if not name.startswith(SOURCE)]:
            if name not in TASKS:
                raise UserError(f"Unknown task '{name}'. {nearest(name, TASKS)}")


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
    if chosen.upcycle is not None:
        check_upcycling(**chosen.upcycle)
    if chosen.encoder is not None:
        if recipe.dtype == FOUR_BIT:
            raise UserError("dtype 4bit came for a model out of parts, which are loaded one by one. Take 4bit out, or name a whole model.")
        plan = plan_composition(**{key: value for key, value in _parts(chosen).items() if key != "chat_template"})
        layers, every = plan.config.get_text_config(decoder=True).num_hidden_layers, (chosen.upcycle or {}).get("every", 1)
        if every > layers:
            raise UserError(f"model.upcycle.every: {every} came for a decoder of {layers} layers, so none is upcycled. Set 1 to {layers}.")


def _parts(choice: ModelChoice) -> dict[str, Any]:
    """Keywords of `compose`."""
    return {"backbone": choice.backbone, "encoder": choice.encoder, "connector": choice.connector, **choice.options}
