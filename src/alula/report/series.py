"""What the run folder adds up to: series of cells, measures over their seeds and orders, intervals over test samples."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from alula.evaluation.bootstrap import Interval, Spread, percentile_interval, spread
from alula.evaluation.measures import MEASURES
from alula.report.members import Member, read_member
from alula.report.reading import Cell, Run

REFERENCES = ("joint", "oracle")


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """A method and an arm over all its seeds and orders. What counts are its finished cells; without one, those there are.

    Attributes:
        among_joint: every series of the run saw all tasks at once, so that this is no privilege.
    """

    method: str
    arm: str
    members: tuple[Member, ...]
    cells: tuple[Cell, ...] = field(default=())
    among_joint: bool = False

    @property
    def name(self) -> str:
        """How the series is shown."""
        return self.method if self.arm == "default" else f"{self.method}:{self.arm}"

    @property
    def is_reference(self) -> bool:
        """True for what no continual learner may do: see all tasks at once, or be told the task."""
        return (self.is_joint and not self.among_joint) or self.arm in REFERENCES

    @property
    def is_joint(self) -> bool:
        """True for training on all tasks at once, whatever the method is called."""
        return self.method in REFERENCES or (bool(self.members) and all(member.is_single_stage for member in self.members))

    @property
    def is_partial(self) -> bool:
        """True where no cell has finished: the last row is not the end of the stream."""
        return bool(self.members) and all(member.cell.state != "finished" for member in self.members)

    @property
    def seeds(self) -> list[int]:
        """The seeds that count."""
        return sorted({member.cell.seed for member in self.members})

    @property
    def orders(self) -> list[int]:
        """The task orders that count."""
        return sorted({member.cell.order for member in self.members})

    @property
    def counted(self) -> str:
        """What a spread is over, in words: ``3 seeds``, or ``6 cells: 3 seeds, 2 orders``."""
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) != 1 else ''}"
        return seeds if len(self.orders) < 2 else f"{len(self.members)} cells: {seeds}, {len(self.orders)} orders"

    def spread(self, metric: str) -> Spread:
        """A measure over cells: seeds and orders."""
        return spread([member.summaries[metric] for member in self.members])

    def by_order(self, metric: str) -> list[float]:
        """The mean over seeds of a measure, for each order."""
        return [float(np.mean([m.summaries[metric] for m in self.members if m.cell.order == order])) for order in self.orders]

    def resampled(self, metric: str) -> np.ndarray:
        """The mean over cells of a measure, for each resample; empty where predictions are missing."""
        draws = [member.resampled[metric] for member in self.members]
        return np.mean(draws, axis=0) if draws and all(len(draw) for draw in draws) else np.array([])

    def interval(self, metric: str) -> Interval | None:
        """The bootstrap interval of the mean over cells."""
        return percentile_interval(self.resampled(metric))

    def num_samples(self, metric: str) -> int:
        """Test samples behind a measure, in one cell."""
        if not self.members:
            return 0
        matrix = self.members[0].matrix
        return int(matrix.counts[matrix.columns(MEASURES[metric].over)].sum())

    def alike(self) -> list[Member]:
        """The members whose tasks came in the order of the first one: their matrices can be averaged."""
        return [m for m in self.members if m.matrix.names == self.members[0].matrix.names and _same_size(m, self.members)]

    def mean_rows(self) -> np.ndarray:
        """The score matrix, averaged over the seeds that share an order."""
        return np.mean([member.matrix.rows for member in self.alike()], axis=0)


def _same_size(member: Member, members: tuple[Member, ...]) -> bool:
    return member.matrix.rows.shape == members[0].matrix.rows.shape


def series_of(run: Run) -> list[Series]:
    """Every series of a run, the best average score first; cells that never scored are left to the list of cells."""
    base = [cell for cell in run.cells if any(row["row"] == 0 for row in cell.scores)]
    grouped: dict[tuple[str, str], list[Cell]] = {}
    for cell in run.cells:
        for arm in cell.arms:
            grouped.setdefault((cell.method, arm), []).append(cell)
    found = []
    for (method, arm), cells in grouped.items():
        finished = [cell for cell in cells if cell.state == "finished"]
        members = tuple(read_member(cell, arm, base=base) for cell in finished or cells)
        found.append(Series(method=method, arm=arm, members=members, cells=tuple(cells)))
    held = [replace(with_references(series, found), among_joint=all_joint(found)) for series in found]
    return sorted(held, key=lambda series: -np.nan_to_num(series.spread("average_score").mean, nan=-1.0))


def all_joint(series: Sequence[Series]) -> bool:
    """Whether all that learnt something learnt all tasks at once."""
    learnt = [one for one in series if any(member.matrix.num_learnt for member in one.members)]
    return bool(learnt) and all(one.is_joint for one in learnt)


def on_shared_cells(first: Series, second: Series) -> tuple[Series, Series]:
    """Both with only the cells of a seed and an order that both have, so that no other order or start makes them differ.

    Where there are no such cells they are as they came.
    """
    shared = {member.cell.place for member in first.members} & {member.cell.place for member in second.members}
    if not shared:
        return first, second
    one, two = (tuple(member for member in each.members if member.cell.place in shared) for each in (first, second))
    return replace(first, members=one), replace(second, members=two)


def reference_of(series: Sequence[Series], name: str) -> Series | None:
    """The finished series that ``joint`` or ``specialist`` measures are held against; None where there is none.

    Where no method has that name it is the only series that is trained on all tasks at once, or that is told the task (arm
    ``oracle``: the same experts as the specialist's).
    """
    whole = [one for one in series if one.members and not one.is_partial]
    named = [one for one in whole if one.method == name]
    alike = [one for one in whole if (one.is_joint if name == "joint" else one.arm == "oracle")]
    return named[0] if named else alike[0] if len(alike) == 1 else None


def with_references(series: Series, every: Sequence[Series]) -> Series:
    """`series` held against the references among `every`, but never against itself."""
    found = {name: reference_of(every, name) for name in dict.fromkeys(one.against for one in MEASURES.values() if one.against)}
    others = {name: one.members for name, one in found.items() if one is not None and one is not series}
    members = [replace(m, references={name: _beside(m.cell, cells) for name, cells in others.items()}) for m in series.members]
    return replace(series, members=tuple(members))


def _beside(cell: Cell, others: tuple[Member, ...]) -> tuple[Member, ...]:
    """The cells with the same seed and order; where there are none those with the same seed, else all."""
    seed = tuple(one for one in others if one.cell.seed == cell.seed)
    return tuple(one for one in seed if one.cell.order == cell.order) or seed or others
