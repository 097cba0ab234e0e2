"""The cells of a grid, one after another or several at once: each point is a run folder of its own, so that a grid can grow."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from rich.progress import Progress

from alula.data.stream import Stream
from alula.files import write_json
from alula.running.cell import Cell
from alula.running.cells import list_cells
from alula.running.choices import load_stream
from alula.running.grid import Grid, Point
from alula.running.parallel import Launcher, affordable_workers, dispatch
from alula.running.run import launching, run_here, start_folder
from alula.training.processes import Team

ABOUT, POINTS = "grid.json", "points"


class ManyFolders:
    """A launcher whose cells are in several run folders."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher, self.limit = launcher, launcher.limit
        self.ended, self.stop = launcher.ended, launcher.stop

    def start(self, cell: Cell) -> None:
        """See `Launcher`."""
        self.launcher.folder = cell.folder.parents[1].resolve()  # type: ignore[attr-defined]
        self.launcher.start(cell)


def run_grid(
    grid: Grid,
    folder: Path,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = print,
    fail_fast: bool = False,
    workers: int | None = 1,
    ray: str | None = None,
) -> int:
    """Runs what is not done of all points, seed by seed, and gives the number of cells that crashed.

    A grid that has got more levels goes on: points that are there with the same recipe are kept.

    Args:
        workers: as in `run_recipe`; None: as many as the largest model of the grid allows.

    Raises:
        UserError: as `run_recipe`, for any point; nothing runs then.
    """
    jobs = sorted(
        ((point, cell) for point in grid.points for cell in list_cells(point.recipe, point_folder(folder, point))),
        key=lambda job: job[0].recipe.seeds.index(job[1].seed),
    )
    streams: dict[str, Stream] = {}
    for point in grid.points:
        if _data(point) not in streams:
            streams[_data(point)] = load_stream(point.recipe)
    for point in grid.points:
        start_folder(point.recipe, point_folder(folder, point))
    write_json(folder / ABOUT, grid.about())
    for _, cell in jobs:
        if cell.is_done:
            say(f"{cell.name}: done already")
    todo = [(point, cell) for point, cell in jobs if not cell.is_done]
    if workers is None and ray is None and todo:
        models = {str(point.recipe.model): point.recipe for point, _ in todo}
        workers = min(affordable_workers(recipe, most=len(todo)) for recipe in models.values())
    with contextlib.ExitStack() as stack:
        count = (workers or 1) if ray is None else workers
        launcher = stack.enter_context(launching(grid.points[0].recipe, folder, workers=count, ray=ray, most=len(todo)))
        if launcher is not None:
            return dispatch([cell for _, cell in todo], ManyFolders(launcher), has_base=lambda: True, say=say)
        team, crashed = Team(), 0
        for point, cell in todo:
            stream = streams[_data(point)]
            crashed += run_here(point.recipe, [cell], stream, progress=progress, say=say, fail_fast=fail_fast, team=team)
        return crashed


def point_folder(folder: Path, point: Point) -> Path:
    """Its run folder: `alula report` reads it as any other."""
    return folder / POINTS / point.label


def _data(point: Point) -> str:
    return f"{point.recipe.tasks} {point.recipe.base_tasks}"
