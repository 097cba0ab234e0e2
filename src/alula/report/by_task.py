"""The last row of every series, task by task: what each can do at the end, beside the untouched model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alula.report.format import show
from alula.report.series import Series

UNTOUCHED = "untouched model"


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """One line: means over cells, by task; what is not known is missing."""

    name: str
    values: dict[str, float]


def scores_by_task(series: Sequence[Series]) -> list[TaskScores]:
    """The untouched model, then every series that learnt something."""
    whole = [one for one in series if any(member.matrix.num_learnt for member in one.members)]
    found = [TaskScores(name=UNTOUCHED, values=_row(series, 0))]
    return found + [TaskScores(name=one.name, values=_row([one], -1)) for one in whole]


def tasks_of(series: Sequence[Series]) -> tuple[list[str], list[str], set[str]]:
    """The tasks of the stream, the base tasks, and which of both are in bits per byte."""
    matrices = [member.matrix for one in series for member in one.members]
    tasks = list(dict.fromkeys(name for matrix in matrices for name in matrix.tasks))
    base = list(dict.fromkeys(name for matrix in matrices for name in matrix.base_tasks))
    return tasks, base, {name for matrix in matrices for name in matrix.bits_tasks}


def show_score(value: float | None, *, is_bits: bool) -> str:
    """Points, or bits per byte."""
    return show(None if value is None else value * (1 if is_bits else 100), digits=3 if is_bits else 1)


def _row(series: Sequence[Series], row: int) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for member in (member for one in series for member in one.members):
        for name, value in zip(member.matrix.names, member.matrix.rows[row], strict=True):
            values.setdefault(name, []).append(float(value))
    return {name: float(np.mean(each)) for name, each in values.items() if np.isfinite(each).all()}
