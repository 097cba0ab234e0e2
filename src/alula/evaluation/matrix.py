"""The score matrix and the numbers that sum it up. numpy only: a report reads it where torch is not installed.

The functions take `rows` (row i = after i tasks, row 0 = base model; a column for each task, then for each base task) with
any axes before it, so that a thousand resampled matrices cost one call. `columns` are the 0-based columns that count:
task j of the papers, learnt in row j, is column j - 1. What was not measured is NaN, and so is what needs it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

Rows = Float[np.ndarray, "*resamples rows tasks"]
Columns = Int[np.ndarray, " columns"]
Values = Float[np.ndarray, "*resamples"]


def _mean(values: Float[np.ndarray, "*resamples columns"]) -> Values:
    return values.mean(-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)


def _learnt(rows: Rows, columns: Columns) -> Float[np.ndarray, "*resamples columns"]:
    """The diagonal: R[j, j], the score on a task right after it was learnt."""
    return rows[..., columns + 1, columns]


def _earlier(rows: Rows, columns: Columns) -> Columns:
    """The tasks before the last, j < T."""
    return columns[columns < rows.shape[-2] - 2]


def average_score(rows: Rows, columns: Columns) -> Values:
    """Mean of the last row over the tasks seen: mean_j R[T, j].

    Source: GEM (Lopez-Paz & Ranzato 2017, arXiv 1706.08840), ACC. Also called Last, MFN.
    """
    return _mean(rows[..., -1, :][..., columns])


def average_over_stages(rows: Rows, columns: Columns) -> Values:
    """Mean over t of the average score after t tasks: mean_t mean_{j <= t} R[t, j].

    Source: average incremental accuracy, iCaRL (Rebuffi et al. 2017, arXiv 1611.07725). Also called Avg, MAA.
    Difference: every row counts, the first one too.
    """
    stages = [(row, columns[columns < row]) for row in range(1, rows.shape[-2])]
    means = [_mean(rows[..., row, :][..., seen]) for row, seen in stages if len(seen)]
    return _mean(np.stack(means, axis=-1)) if means else np.full(rows.shape[:-2], np.nan)


def learning_accuracy(rows: Rows, columns: Columns) -> Values:
    """Mean of the diagonal: mean_j R[j, j], how well a task is learnt when it comes.

    Source: Riemer et al. 2019, arXiv 1810.11910 (LA). Also called MFT.
    """
    return _mean(_learnt(rows, columns))


def backward_transfer(rows: Rows, columns: Columns) -> Values:
    """Mean over j < T of R[T, j] - R[j, j]. Negative = worse than right after learning; positive = later tasks helped.

    Source: GEM (arXiv 1706.08840), BWT.
    """
    earlier = _earlier(rows, columns)
    return _mean(rows[..., -1, :][..., earlier] - _learnt(rows, earlier))


def forward_transfer(rows: Rows, columns: Columns) -> Values:
    """Mean over j > 1 of R[j-1, j] - R[0, j]. Positive = earlier tasks helped with one not yet learnt.

    Source: GEM (arXiv 1706.08840), FWT. Difference: GEM subtracts a randomly initialised model, ours the base model.
    """
    later = columns[(columns > 0) & (columns < rows.shape[-2] - 1)]
    return _mean(rows[..., later, later] - rows[..., 0, :][..., later])


def forgetting(rows: Rows, columns: Columns) -> Values:
    """Mean over j < T of max_{1 <= l < T} R[l, j] - R[T, j]. Positive = worse than the best so far; may be negative.

    Source: Chaudhry et al. 2018 (arXiv 1801.10112), equation 3: the base model's row and the last row are not in the
    maximum. Difference: rows in which a task was not measured are left out of its maximum.
    A maximum over noisy rows is biased upwards: with few samples forgetting is above -BWT by chance alone.
    """
    earlier = _earlier(rows, columns)
    if not len(earlier):
        return np.full(rows.shape[:-2], np.nan)
    best = np.fmax.reduce(rows[..., 1:-1, :][..., earlier], axis=-2)
    return _mean(best - rows[..., -1, :][..., earlier])


def base_forgetting(rows: Rows, columns: Columns) -> Values:
    """Mean over base tasks of R[0, b] - R[T, b]. Positive = the base model could do it better.

    Source: ours; linguistic forgetting in Srivastava et al. 2025 (arXiv 2410.19925), with one base row for all stages.
    """
    return _mean(rows[..., 0, :][..., columns] - rows[..., -1, :][..., columns])


def base_bits_increase(rows: Rows, columns: Columns) -> Values:
    """Mean over base tasks in bits per byte of R[T, b] - R[0, b]. Positive = prose costs more bits: forgotten.

    Source: ours. Bits are never averaged with scores of 0 to 1.
    """
    return -base_forgetting(rows, columns)


OVER_TASKS: dict[str, Callable[[Rows, Columns], Values]] = {
    "average_score": average_score,
    "average_over_stages": average_over_stages,
    "learning_accuracy": learning_accuracy,
    "backward_transfer": backward_transfer,
    "forward_transfer": forward_transfer,
    "forgetting": forgetting,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreMatrix:
    """R[i, j]: the score on task j after i tasks; row 0 is the base model.

    Attributes:
        tasks: the stream, in the order of learning; the first columns of `rows`.
        base_tasks: never trained; the columns after them.
        rows: scores from 0 to 1, or bits per byte for `bits_tasks`; NaN where nothing was measured.
        counts: samples behind each column.
        bits_tasks: names of the columns in bits per byte, lower is better. They are kept out of every mean of scores.

    Example:
        >>> matrix = ScoreMatrix(
        ...     tasks=("a", "b"), rows=np.array([[0.1, 0.2], [0.9, 0.3], [0.5, 0.7]]), counts=np.array([100, 100])
        ... )
        >>> round(matrix.average_score, 3), round(matrix.backward_transfer, 3), round(matrix.forward_transfer, 3)
        (0.6, -0.4, 0.1)
    """

    tasks: tuple[str, ...]
    base_tasks: tuple[str, ...] = ()
    rows: Float[np.ndarray, "rows tasks"]
    counts: Int[np.ndarray, " tasks"]
    bits_tasks: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        wide = len(self.tasks) + len(self.base_tasks)
        if self.rows.ndim != 2 or self.rows.shape[1] != wide or len(self.counts) != wide:
            raise ValueError(
                f"rows {self.rows.shape} and counts {self.counts.shape} came for {len(self.tasks)} tasks and "
                f"{len(self.base_tasks)} base tasks. Wanted: rows [stages + 1, {wide}], counts [{wide}]."
            )
        if len(self.rows) > len(self.tasks) + 1:
            raise ValueError(f"{len(self.rows)} rows came for {len(self.tasks)} tasks: at most one a task and row 0.")

    @property
    def num_learnt(self) -> int:
        """T: tasks learnt when the last row was measured."""
        return len(self.rows) - 1

    @property
    def names(self) -> tuple[str, ...]:
        """The columns: tasks, then base tasks."""
        return self.tasks + self.base_tasks

    @cached_property
    def seen(self) -> Columns:
        """Columns of the tasks learnt so far that are scored from 0 to 1."""
        learnt = range(min(self.num_learnt, len(self.tasks)))
        return np.array([column for column in learnt if self.tasks[column] not in self.bits_tasks], dtype=int)

    def _base(self, *, in_bits: bool) -> Columns:
        first = len(self.tasks)
        wanted = [name in self.bits_tasks for name in self.base_tasks]
        return np.array([first + i for i, is_bits in enumerate(wanted) if is_bits == in_bits], dtype=int)

    def summarise(self, rows: Rows | None = None) -> dict[str, Values]:
        """Every summary by name, of these rows or of resampled ones with the same columns."""
        values = self.rows if rows is None else rows
        summaries = {name: summary(values, self.seen) for name, summary in OVER_TASKS.items()}
        summaries["base_forgetting"] = base_forgetting(values, self._base(in_bits=False))
        summaries["base_bits_increase"] = base_bits_increase(values, self._base(in_bits=True))
        return summaries

    @property
    def last(self) -> Float[np.ndarray, " tasks"]:
        """The last row: what the model can do now."""
        return self.rows[-1]

    @property
    def average_score(self) -> float:
        """See `average_score`."""
        return float(average_score(self.rows, self.seen))

    @property
    def average_over_stages(self) -> float:
        """See `average_over_stages`."""
        return float(average_over_stages(self.rows, self.seen))

    @property
    def learning_accuracy(self) -> float:
        """See `learning_accuracy`."""
        return float(learning_accuracy(self.rows, self.seen))

    @property
    def backward_transfer(self) -> float:
        """See `backward_transfer`."""
        return float(backward_transfer(self.rows, self.seen))

    @property
    def forward_transfer(self) -> float:
        """See `forward_transfer`."""
        return float(forward_transfer(self.rows, self.seen))

    @property
    def forgetting(self) -> float:
        """See `forgetting`."""
        return float(forgetting(self.rows, self.seen))

    @property
    def base_forgetting(self) -> float:
        """See `base_forgetting`."""
        return float(base_forgetting(self.rows, self._base(in_bits=False)))

    @property
    def base_bits_increase(self) -> float:
        """See `base_bits_increase`."""
        return float(base_bits_increase(self.rows, self._base(in_bits=True)))
