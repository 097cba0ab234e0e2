"""The score matrix: every row, what its columns are, and every measure of it. numpy only: a report reads it where torch is
not installed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from alula.evaluation.measures import MEASURES, Columns, Measure, Reference, Rows, Values


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreMatrix:
    """R[i, j]: the score on task j after i tasks; row 0 is the base model.

    Attributes:
        tasks: the stream, in the order of learning; the first columns of `rows`.
        base_tasks: never trained; the columns after them.
        rows: scores from 0 to 1, or bits per byte for `bits_tasks`; NaN where nothing was measured.
        counts: samples behind each column.
        bits_tasks: names of the columns in bits per byte, lower is better. They are kept out of every mean of scores.
        ranked_tasks: names of the columns where the model ranks given options (understanding); elsewhere it writes.
        probe_tasks: names of base tasks that no measure counts (`Task.is_probe`).

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
    ranked_tasks: frozenset[str] = frozenset()
    probe_tasks: frozenset[str] = frozenset()

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

    def columns(self, over: str) -> Columns:
        """The columns that a measure over `over` counts, a key of `measures.OVER`."""
        if not over.startswith("base"):
            latest = self.num_learnt - 1
            return self.seen[{"earlier": self.seen < latest, "later": self.seen > 0}.get(over, slice(None))]
        kinds = [self._kind(name) for name in self.base_tasks]
        wanted = {"base": ("ranked", "generated")}.get(over, (over.removeprefix("base_"),))
        return np.array([len(self.tasks) + i for i, kind in enumerate(kinds) if kind in wanted], dtype=int)

    def _kind(self, name: str) -> str:
        """What a base task measures."""
        if name in self.probe_tasks:
            return "probe"
        return "bits" if name in self.bits_tasks else "ranked" if name in self.ranked_tasks else "generated"

    def summarise(self, rows: Rows | None = None, *, references: Mapping[str, Reference] | None = None) -> dict[str, Values]:
        """Every measure by name, but that of answers; of these rows or of resampled ones with the same columns.

        Args:
            references: for ``joint`` and ``specialist`` the last row on the same columns; what needs one that is not here
                is NaN.
        """
        values = self.rows if rows is None else rows
        return {name: self._measured(one, values, references or {}) for name, one in MEASURES.items() if one.over != "answers"}

    def _measured(self, measure: Measure, rows: Rows, references: Mapping[str, Reference]) -> Values:
        columns = self.columns(measure.over)
        if not measure.against:
            return measure.function(rows, columns)
        if measure.against not in references:
            return np.full(rows.shape[:-2], np.nan)
        return measure.function(rows, columns, references[measure.against])

    def value(self, name: str, *, references: Mapping[str, Reference] | None = None) -> float:
        """The measure `name` of this matrix; see `summarise`."""
        return float(self._measured(MEASURES[name], self.rows, references or {}))

    @property
    def last(self) -> Float[np.ndarray, " tasks"]:
        """The last row: what the model can do now."""
        return self.rows[-1]

    @property
    def average_score(self) -> float:
        """See `average_score`."""
        return self.value("average_score")

    @property
    def average_over_stages(self) -> float:
        """See `average_over_stages`."""
        return self.value("average_over_stages")

    @property
    def learning_accuracy(self) -> float:
        """See `learning_accuracy`."""
        return self.value("learning_accuracy")

    @property
    def backward_transfer(self) -> float:
        """See `backward_transfer`."""
        return self.value("backward_transfer")

    @property
    def forward_transfer(self) -> float:
        """See `forward_transfer`."""
        return self.value("forward_transfer")

    @property
    def forgetting(self) -> float:
        """See `forgetting`."""
        return self.value("forgetting")

    @property
    def base_forgetting(self) -> float:
        """See `base_forgetting`."""
        return self.value("base_forgetting")

    @property
    def base_bits_increase(self) -> float:
        """See `base_bits_increase`."""
        return self.value("base_bits_increase")
