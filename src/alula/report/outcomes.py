"""A grid's folder becomes effects: of every outcome, what each level of each factor adds, with its interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alula.errors import UserError
from alula.evaluation.bootstrap import Interval, percentile_interval
from alula.files import read_json
from alula.report.columns import family_of
from alula.report.effects import Additive, draw_seeds
from alula.report.format import show_interval
from alula.report.members import Member, read_member
from alula.report.reading import Cell, read_run

ABOUT, POINTS = "grid.json", "points"
AVERAGE = "average score"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of a grid: its finished cells."""

    label: str
    levels: dict[str, str]
    folder: Path
    cells: tuple[Cell, ...]
    members: tuple[Member, ...]


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
    def seeds(self) -> int:
        """The fewest seeds that a point has finished."""
        return min((len({member.cell.seed for member in point.members}) for point in self.whole), default=0)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one level adds, in units of the outcome; `num_cells` finished cells have that level, `mean` is theirs by points."""

    level: str
    value: float
    interval: Interval | None
    mean: float
    num_cells: int

    @property
    def is_clear(self) -> bool:
        """More than noise."""
        return self.interval is not None and self.interval.excludes(0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """A factor's effects, and the difference of its best and its worst level with the draws of that."""

    name: str
    effects: tuple[Effect, ...]
    best: str
    worst: str
    range: float
    draws: np.ndarray

    @property
    def interval(self) -> Interval | None:
        """Of the difference."""
        return percentile_interval(self.draws)

    @property
    def is_clear(self) -> bool:
        """More than noise."""
        return self.interval is not None and self.interval.excludes(0.0)


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """What two levels together have beyond the sum of their effects."""

    levels: tuple[tuple[str, str], tuple[str, str]]
    value: float
    interval: Interval | None

    @property
    def name(self) -> str:
        """Both levels with their factors."""
        return " with ".join(f"{factor} {level}" for factor, level in self.levels)

    @property
    def is_clear(self) -> bool:
        """More than noise."""
        return self.interval is not None and self.interval.excludes(0.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """The effects on one number; scores are in points, bits in thousandths."""

    name: str
    unit: str
    is_higher_better: bool
    grand: float
    factors: tuple[Factor, ...]
    interactions: tuple[Interaction, ...]


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
    cells = read_run(folder).cells if (folder / "cells").is_dir() else ()
    base = [cell for cell in cells if any(row["row"] == 0 for row in cell.scores)]
    members = tuple(read_member(cell, cell.arms[0], base=base) for cell in cells if cell.state == "finished" and cell.arms)
    return Point(label=about["label"], levels=about["levels"], folder=folder, cells=cells, members=members)


def outcomes_of(ablation: Ablation) -> list[Outcome]:
    """The average score, the mean over each family of probe tasks, then the last score of each task that all finished cells have.

    What the grid names as its outcome comes first.
    """
    members = [member for point in ablation.whole for member in point.members]
    if len(ablation.whole) < 2:
        return []
    matrix = members[0].matrix
    shared = [name for name in matrix.names if all(name in member.matrix.names for member in members)]
    found = [_outcome(ablation, AVERAGE, _average)] if len([name for name in shared if name in matrix.tasks]) != 1 else []
    families: dict[str, list[str]] = {}
    for name in shared:
        if name in matrix.probe_tasks - matrix.bits_tasks:
            families.setdefault(family_of(name), []).append(name)
    found += [_outcome(ablation, family, _last(*names)) for family, names in families.items() if len(names) > 1]
    found += [_outcome(ablation, name, _last(name)) for name in shared]
    chosen = ablation.about.get("outcome") or AVERAGE
    known = [one for one in found if np.isfinite(one.grand)]
    return sorted(known, key=lambda one: (one.name != chosen, family_of(one.name) != chosen))


Values = Callable[[Member], tuple[float, np.ndarray]]
"""Of one cell a number, and a thousand of it from resampled test samples."""


def _average(member: Member) -> tuple[float, np.ndarray]:
    return member.summaries["average_score"], member.resampled["average_score"]


def _last(*names: str) -> Values:
    def values(member: Member) -> tuple[float, np.ndarray]:
        columns = [member.matrix.names.index(name) for name in names]
        return float(member.matrix.rows[-1, columns].mean()), member.resampled_rows[:, -1, columns].mean(axis=-1)

    return values


def _outcome(ablation: Ablation, name: str, values: Values) -> Outcome:
    points, generator = ablation.whole, np.random.default_rng(0)
    is_bits = name in points[0].members[0].matrix.bits_tasks
    scale = 1000.0 if is_bits else 100.0
    found = [[values(member) for member in point.members] for point in points]
    y = scale * np.array([np.mean([value for value, _ in cells]) for cells in found])
    drawn = scale * np.array([draw_seeds(np.array([draws for _, draws in cells]), generator) for cells in found])
    fit = Additive([point.levels for point in points], ablation.about["factors"])
    sign = -1.0 if is_bits else 1.0
    factors = [_factor(fit, factor, y, drawn, points, sign=sign) for factor in fit.factors]
    together = [
        Interaction(levels=levels, value=float(given @ y), interval=percentile_interval(_exact(given @ drawn)))
        for levels, given in fit.interactions().items()
    ]
    return Outcome(
        name=name,
        unit="thousandths of a bit per byte" if is_bits else "points",
        is_higher_better=not is_bits,
        grand=float(fit.grand @ y),
        factors=tuple(sorted(factors, key=lambda factor: -np.nan_to_num(factor.range, nan=-1.0))),
        interactions=tuple(sorted(together, key=lambda one: -abs(one.value))),
    )


def _factor(fit: Additive, name: str, y: np.ndarray, drawn: np.ndarray, points: Sequence[Point], *, sign: float) -> Factor:
    levels, given = fit.factors[name], fit.effects(name)
    values, draws, means = given @ y, _exact(given @ drawn), fit.means(name) @ y
    counts = [sum(len(point.members) for point in points if point.levels[name] == level) for level in levels]
    effects = tuple(
        Effect(level=level, value=float(values[i]), interval=percentile_interval(draws[i]), mean=float(means[i]), num_cells=counts[i])
        for i, level in enumerate(levels)
    )
    best, worst = int(np.argmax(sign * values)), int(np.argmin(sign * values))
    return Factor(
        name=name,
        effects=effects,
        best=levels[best],
        worst=levels[worst],
        range=abs(float(values[best] - values[worst])),
        draws=_exact(sign * (draws[best] - draws[worst])),
    )


def _exact(draws: np.ndarray) -> np.ndarray:
    """Without the dust of floating point: an interval that ends at zero does not leave zero out."""
    return np.round(draws, 9)


def shown(interval: Interval | None) -> str:
    """An interval that is in the outcome's units already."""
    return show_interval(interval, scale=1.0)
