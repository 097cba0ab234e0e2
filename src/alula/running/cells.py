"""Which cells a recipe has: method x seed x order. A cell's name and the run folder are all that another process needs to run it."""

import hashlib
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from alula.config import MethodChoice, Recipe
from alula.data.interleaved.encoder import minilm_folder
from alula.errors import UserError, nearest
from alula.files import clear_leftovers, sha256, write_json
from alula.methods import METHODS, Method
from alula.running.cell import CRASHED, Cell
from alula.running.options import check_options
from alula.running.packed import refuse_rows
from alula.running.shots import BY_SIMILARITY
from alula.training import TrainSettings
from alula.training.processes import Team

RECIPE, VERSIONS, WEIGHTS = "recipe.yaml", "versions.json", "weights.json"


def list_cells(recipe: Recipe, folder: Path) -> list[Cell]:
    """Every cell, seed by seed and order by order, so that a cut run is balanced.

    Raises:
        UserError: an unknown method or addition, options it does not take, or ``joint: true`` for a method that arranges its stream
            itself.
    """
    check_methods(recipe)
    return [
        make_cell(recipe, choice, seed, folder, order=order)
        for seed in recipe.seeds
        for order in range(len(recipe.orders) or 1)
        for choice in recipe.methods
        if order in recipe.orders_of(choice)
    ]


def find_cell(recipe: Recipe, folder: Path, name: str) -> Cell:
    """The cell whose folder has that name.

    Raises:
        UserError: the recipe has no such cell.
    """
    cells = {cell.name: cell for cell in list_cells(recipe, folder)}
    if name not in cells:
        raise UserError(f"Unknown cell '{name}'. {nearest(name, cells)}")
    return cells[name]


def check_methods(recipe: Recipe) -> None:
    """Refuses methods that are unknown or cannot be run as asked, and shots by similarity without the package that tells it.

    Raises:
        UserError: see `list_cells`.
    """
    if any(recipe.evaluation.shots) and recipe.evaluation.shots_by == BY_SIMILARITY:
        minilm_folder()
    for choice in recipe.methods:
        kind = METHODS[choice.name]
        check_options(choice)
        if {**recipe.train.model_dump(), **choice.train}.get("pack"):
            refuse_rows(choice.name, kind)
        if choice.joint and kind.arrange is not Method.arrange:
            raise UserError(
                f"Method '{choice.name}' came with joint: true, but it arranges its stream itself. Take 'joint' out, or use another method."
            )


def make_cell(recipe: Recipe, choice: MethodChoice, seed: int, folder: Path, *, order: int = 0) -> Cell:
    """The cell of one method, seed and order."""
    training = {**recipe.train.model_dump(), **choice.train, "seed": seed}
    pack = training.pop("pack", None)
    is_first = seed == recipe.seeds[0] and order == recipe.orders_of(choice)[0]
    suffix = f"-order{order}" if order else ""
    return Cell(
        method=choice.name,
        label=choice.shown,
        seed=seed,
        tasks=tuple(recipe.order(order)) if recipe.orders else (),
        joint=choice.joint,
        additions=tuple((addition.name, addition.options) for addition in choice.additions),
        settings=TrainSettings(**training),
        pack=pack,
        options=choice.options,
        folder=folder / "cells" / f"{choice.shown}-seed{seed}{suffix}",
        base_folder=base_folder(folder),
        batch_size=recipe.evaluation.batch_size,
        future_tasks=recipe.evaluation.future_tasks,
        base_row=recipe.evaluation.base_row,
        base_every_task=recipe.evaluation.base_every_task,
        examples=recipe.examples if is_first else 0,
        shots=tuple(recipe.evaluation.shots),
        shots_by=recipe.evaluation.shots_by,
        shots_as=recipe.evaluation.shots_as,
        attention_shift=recipe.evaluation.attention_shift,
        image_cache=image_folder(recipe, folder),
        trackers=tuple(recipe.trackers),
        # label, order and joint are no part of it: the folder and the names of the tasks tell those apart
        identity=hashlib.sha256(f"{recipe.model}{recipe.tasks}{choice}{choice.additions or ''}{pack or ''}".encode()).hexdigest(),
    )


def weight_digests(recipe: Recipe) -> dict[str, str]:
    """The sha256 of each file that an encoder or a connector of the model takes its weights from, by its path."""
    if isinstance(recipe.model, str):
        return {}
    listed = [part for some in (recipe.model.encoder, recipe.model.connector) for part in (some if isinstance(some, list) else [some])]
    files = [Path(part["weights"]) for part in listed if isinstance(part, dict) and part.get("weights")]
    return {str(file): sha256(file) for file in files if file.is_file()}


def base_folder(folder: Path) -> Path:
    """Where row 0, the untouched model's predictions, is kept for all cells of a run."""
    return folder / "base"


def image_folder(recipe: Recipe, folder: Path) -> Path | None:
    """Where all cells of a run keep what the image encoder says; None: nowhere."""
    chosen = recipe.cache_images
    return chosen if isinstance(chosen, Path) else folder / "images" if chosen else None


def has_base(folder: Path, names: Iterable[str]) -> bool:
    """Whether row 0 is measured on all tasks of these names."""
    return all((base_folder(folder) / f"{name}.jsonl").exists() for name in names)


def attempt(cell: Cell, run: Callable[[], None], *, team: Team | None = None) -> str | None:
    """Runs a cell; a crash is written into its folder and given back as a sentence, so that it loses no other cell.

    Of several processes that work on the cell, all must have failed to go on with the next: where one fails alone, the
    others hang, and its error is raised to end the launch.
    """
    team = team or Team()
    if team.is_main:
        clear_leftovers(cell.folder)
        (cell.folder / CRASHED).unlink(missing_ok=True)
    team.wait()
    crash: Exception | None = None
    try:
        run()
    except Exception as error:
        crash, trace = error, "" if isinstance(error, UserError) else traceback.format_exc()
        write_crash(cell, f"{type(error).__name__}: {error}", trace=trace)
    try:
        return team.agree(None if crash is None else str(crash))
    except RuntimeError as hanging:
        raise crash or hanging from hanging


def write_crash(cell: Cell, error: str, *, trace: str = "") -> None:
    """Puts down what a cell crashed with."""
    write_json(cell.folder / CRASHED, {"error": error, "trace": trace})
