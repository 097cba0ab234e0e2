"""A recipe's cells, one after another or several at once; what is done is skipped, what crashed is written down as crashed."""

import contextlib
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from alula.config import Recipe, write_recipe
from alula.data.stream import Stream
from alula.errors import UserError
from alula.files import write_json, write_text
from alula.running.cell import Cell, run_cell
from alula.running.cells import RECIPE, VERSIONS, WEIGHTS, attempt, has_base, list_cells, weight_digests
from alula.running.choices import check_model, load_chosen, load_stream
from alula.running.extending import refuse_other, refuse_other_weights
from alula.running.parallel import Launcher, Processes, affordable_workers, dispatch
from alula.running.shots import scored_names
from alula.training.processes import Team


def run_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
    fail_fast: bool = False,
    workers: int | None = 1,
    ray: str | None = None,
) -> int:
    """Runs all cells (seed by seed, so that a cut run is balanced) into `folder` and gives the number that crashed.

    A cell gives the same numbers to the bit wherever it runs, as long as its process has as many threads. In several processes
    of one launch (torchrun) all of them call this and work on one cell after the other.

    Args:
        say: is told one line per cell.
        fail_fast: let the first crash through; for cells in this process only.
        workers: cells at once. One runs in this process, several in processes of their own, which share its threads. None:
            as many as memory and cores allow; on Ray, one for each GPU, or for each machine where there are none.
        ray: the address of a Ray cluster whose machines all see `folder`; None: this machine.

    Raises:
        UserError: `folder` holds a run of another recipe (see `refuse_other`), a method or one of its options is unknown, the stream
            cannot be loaded, there is no such cluster, or workers are wanted in several processes; nothing is written then.
    """
    team = Team()
    if team.count > 1 and (workers != 1 or ray is not None):
        raise UserError(
            f"This run was started in {team.count} processes, which train each cell together, and cells at once (--workers, --ray) "
            "were wanted as well. Take that out, or start one process."
        )
    cells = list_cells(recipe, folder)
    check_model(recipe)
    stream = load_stream(recipe)
    with contextlib.ExitStack() as stack:
        launcher = stack.enter_context(launching(recipe, folder, workers=workers, ray=ray, most=len(cells)))
        team.from_main(lambda: start_folder(recipe, folder))
        is_done = team.from_main(lambda: [cell.is_done for cell in cells])
        for cell in itertools.compress(cells, is_done):
            say(f"{cell.name}: done already")
        todo = [cell for cell, over in zip(cells, is_done, strict=True) if not over]
        if launcher is None:
            return run_here(recipe, todo, stream, progress=progress, say=say, fail_fast=fail_fast, team=team)
        names = scored_names(stream, recipe.evaluation.shots, form=recipe.evaluation.shots_as)
        return dispatch(todo, launcher, has_base=lambda: not recipe.evaluation.base_row or has_base(folder, names), say=say)


@contextlib.contextmanager
def launching(recipe: Recipe, folder: Path, *, workers: int | None, ray: str | None, most: int) -> Iterator[Launcher | None]:
    """Where at most `most` cells run at once; None: one after another in this process. See `run_recipe`."""
    if ray is not None:
        from alula.running.on_ray import RayTasks, connected

        with connected(ray) as cluster:
            yield RayTasks(cluster, folder, workers=workers)
        return
    count = affordable_workers(recipe, most=most) if workers is None else workers
    yield Processes(folder, workers=count) if count > 1 else None


def run_here(
    recipe: Recipe,
    cells: Sequence[Cell],
    stream: Stream,
    *,
    progress: Progress | None,
    say: Callable[[str], None],
    fail_fast: bool,
    team: Team,
) -> int:
    """Runs cells of `recipe` one after another in this process, and gives the number that crashed."""
    crashed = 0
    for cell in cells:
        say(f"{cell.name}: running")
        run = partial(run_cell, cell, stream, lambda: load_chosen(recipe), progress=progress, team=team)
        error = None
        if fail_fast:
            run()
        else:
            error = attempt(cell, run, team=team)
        crashed += error is not None
        say(f"{cell.name}: done" if error is None else f"{cell.name}: crashed: {error}")
    return crashed


def start_folder(recipe: Recipe, folder: Path) -> None:
    """Writes the resolved recipe, the digests of files that its model is made of, and the versions once.

    Raises:
        UserError: the folder holds a run of another recipe (see `refuse_other`), or of a file that was another one.
    """
    kept, digests = folder / RECIPE, weight_digests(recipe)
    if kept.exists():
        refuse_other(recipe, kept)
    elif any(folder.glob("cells/*/done.json")):
        raise UserError(f"{folder} holds finished cells, but no {RECIPE} that says of what. Restore it, or choose another --out folder.")
    if digests:
        refuse_other_weights(digests, folder / WEIGHTS)
        write_json(folder / WEIGHTS, digests)
    write_text(kept, write_recipe(recipe))
    packages = ("alula", "torch", "transformers", "accelerate", "datasets", "numpy")
    versions: dict[str, Any] = {name: importlib.metadata.version(name) for name in packages}
    versions |= {"python": platform.python_version(), "machine": f"{os.cpu_count()} x {platform.machine()}"}
    if not (folder / VERSIONS).exists():
        write_json(folder / VERSIONS, versions)
