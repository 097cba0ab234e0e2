"""A recipe's cells, one after another; what is done is skipped, what crashed is written down as crashed."""

import hashlib
import importlib.metadata
import os
import platform
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.progress import Progress
from torch import nn

from alula.config import MethodChoice, Recipe, TaskChoice, check_recipe, write_recipe
from alula.data.readers import check_images, read_task, read_test
from alula.data.stream import Stream, Task
from alula.data.tasks import load_task
from alula.errors import UserError
from alula.files import write_json, write_text
from alula.methods import METHODS
from alula.models import load_model
from alula.running.cell import Cell, limited, run_cell
from alula.training import TrainSettings

RECIPE, VERSIONS = "recipe.yaml", "versions.json"


def load_choice(choice: TaskChoice) -> Task:
    """The task a recipe names: built-in, or read from the user's file.

    Raises:
        UserError: an unknown built-in task, or data that cannot be used (with file and line), images included.
    """
    if choice.path is None:
        return load_task(choice.name, train_size=choice.train_size, test_size=choice.test_size)
    task = read_task(choice.name, choice.path, test_path=choice.test_path, scoring=choice.scoring)
    task = limited(task, train_size=choice.train_size, test_size=choice.test_size)
    check_images([*task.train, *task.test])  # now, not in the middle of the training
    return task


def load_to_score(choice: TaskChoice) -> Task:
    """As `load_choice`, but every row of a user's file is scored; a folder's test rows are.

    Raises:
        UserError: as `load_choice`.
    """
    if choice.path is None or choice.path.is_dir():
        return load_choice(choice)
    task = read_test(choice.name, choice.path, scoring=choice.scoring)
    check_images(task.test)
    return task


def load_stream(recipe: Recipe) -> Stream:
    """The recipe's stream."""
    base = tuple(load_choice(choice) for choice in recipe.base_tasks)
    return Stream(tasks=tuple(load_choice(choice) for choice in recipe.tasks), base_tasks=base)


def run_recipe(
    recipe: Recipe, folder: Path, *, progress: Progress | None = None, say: Callable[[str], None] = print, fail_fast: bool = False
) -> int:
    """Runs all cells (seed by seed, so that a cut run is balanced) into `folder` and gives the number that crashed.

    Args:
        say: is told one line per cell.
        fail_fast: let the first crash through.

    Raises:
        UserError: `folder` holds a run of another recipe, a method is unknown, or the stream cannot be loaded; nothing is
            written then.
    """
    for choice in recipe.methods:
        METHODS[choice.name]
    stream = load_stream(recipe)
    start_folder(recipe, folder)
    crashed = 0
    for seed in recipe.seeds:
        for choice in recipe.methods:
            cell = make_cell(recipe, choice, seed, folder)
            name = cell.folder.name
            if cell.is_done:
                say(f"{name}: done already")
                continue
            say(f"{name}: running")
            try:
                run_cell(cell, stream, lambda: _load(recipe), progress=progress)
                (cell.folder / "crashed.json").unlink(missing_ok=True)
                say(f"{name}: done")
            except Exception as error:  # a crash of one cell must not lose the others; it is shown as crashed
                if fail_fast:
                    raise
                crashed += 1
                trace = "" if isinstance(error, UserError) else traceback.format_exc()
                write_json(cell.folder / "crashed.json", {"error": f"{type(error).__name__}: {error}", "trace": trace})
                say(f"{name}: crashed: {error}")
    return crashed


def start_folder(recipe: Recipe, folder: Path) -> None:
    """Writes the resolved recipe and the versions, once.

    Raises:
        UserError: the folder holds a run of another recipe.
    """
    text = write_recipe(recipe)
    kept = folder / RECIPE
    if kept.exists() and not _is_same(recipe, kept):
        raise UserError(
            f"{folder} holds a run of another recipe (see {kept}). Continue it with the same recipe, or choose another --out folder."
        )
    write_text(kept, text)
    packages = ("alula", "torch", "transformers", "accelerate", "datasets", "numpy")
    versions: dict[str, Any] = {name: importlib.metadata.version(name) for name in packages}
    versions |= {"python": platform.python_version(), "machine": f"{os.cpu_count()} x {platform.machine()}"}
    if not (folder / VERSIONS).exists():
        write_json(folder / VERSIONS, versions)


def _is_same(recipe: Recipe, kept: Path) -> bool:
    """By meaning, not by letter: a key that a newer alula knows, at its default, changes nothing."""
    try:
        return check_recipe(yaml.safe_load(kept.read_text(encoding="utf-8"))) == recipe
    except (UserError, yaml.YAMLError, UnicodeDecodeError):
        return False


def make_cell(recipe: Recipe, choice: MethodChoice, seed: int, folder: Path) -> Cell:
    """The cell of one method and seed."""
    settings = TrainSettings(**{**recipe.train.model_dump(), **choice.train, "seed": seed})
    is_first = seed == recipe.seeds[0]
    return Cell(
        method=choice.name,
        label=choice.shown,
        seed=seed,
        settings=settings,
        options=choice.options,
        folder=folder / "cells" / f"{choice.shown}-seed{seed}",
        base_folder=folder / "base",
        batch_size=recipe.evaluation.batch_size,
        future_tasks=recipe.evaluation.future_tasks,
        examples=recipe.examples if is_first else 0,
        trackers=tuple(recipe.trackers),
        identity=hashlib.sha256(f"{recipe.model}{recipe.tasks}{choice}".encode()).hexdigest(),
    )


def _load(recipe: Recipe) -> tuple[nn.Module, Any]:
    return load_model(recipe.model, dtype=recipe.dtype)
