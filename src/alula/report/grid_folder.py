"""The folder of a grid as it lies on disk: its points, their finished cells, and what the grid asks."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from alula.errors import UserError
from alula.files import read_json
from alula.report.members import Member, read_member
from alula.report.reading import Cell, read_run
from alula.report.same_samples import SameSamples, on_same_samples

ABOUT, POINTS = "grid.json", "points"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a grid: its finished cells, and the files of it that cannot be read, one sentence each."""

    label: str
    levels: dict[str, str]
    folder: Path
    cells: tuple[Cell, ...]
    members: tuple[Member, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A grid's folder, read."""

    folder: Path
    about: dict
    points: tuple[Point, ...]

    @property
    def whole(self) -> list[Point]:
        """The points with a finished cell."""
        return [point for point in self.points if point.members]

    @property
    def has_seeds(self) -> bool:
        """Whether a point has finished several."""
        return any(len(point.members) > 1 for point in self.points)

    @property
    def asked(self) -> list[str]:
        """The outcomes that the grid names; older folders have one or none."""
        named = self.about.get("outcome") or []
        return [named] if isinstance(named, str) else named

    @property
    def groups(self) -> dict[str, list[str]]:
        """Of each group of tasks their names."""
        return self.about.get("groups") or {}

    @property
    def steps(self) -> list[str]:
        """The factors whose levels have an order."""
        return self.about.get("steps") or []

    @cached_property
    def scores(self) -> SameSamples:
        """What the finished cells can at the end, on the test samples that all of them share."""
        return on_same_samples([point.members for point in self.whole])


def read_ablation(folder: Path | str) -> Ablation:
    """What `alula ablate` wrote so far.

    Raises:
        UserError: `folder` is no grid's folder.
    """
    home = Path(folder)
    if not (home / ABOUT).exists():
        raise UserError(f"{home} has no {ABOUT}: it is not the folder of a grid. Give the folder that `alula ablate` wrote.")
    about = read_json(home / ABOUT)
    return Ablation(folder=home, about=about, points=tuple(_read_point(home / POINTS / one["label"], one) for one in about["points"]))


def _read_point(folder: Path, about: dict) -> Point:
    run = read_run(folder) if (folder / "cells").is_dir() else None
    cells = run.cells if run else ()
    base = [cell for cell in cells if any(row["row"] == 0 for row in cell.scores)]
    members = tuple(read_member(cell, cell.arms[0], base=base) for cell in cells if cell.state == "finished" and cell.arms)
    problems = (*(run.problems if run else ()), *(text for member in members for text in member.problems))
    return Point(label=about["label"], levels=about["levels"], folder=folder, cells=cells, members=members, problems=problems)
