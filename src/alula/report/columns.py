"""What may be said of a series in one column of a table: measures, skill gained, probes, attention shift, cost.

A column is shown where something is known for it, so that tables of streams, of joint training and of half a run are the same code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from alula.evaluation.bootstrap import Interval, bootstrap_interval, percentile_interval
from alula.evaluation.measures import MEASURES, Measure
from alula.report.attention_shift import shifts_of_cell
from alula.report.format import show, show_amount, show_bytes, show_interval, show_time
from alula.report.members import Member
from alula.report.series import Series

NAN = np.nan


@dataclass(frozen=True, kw_only=True)
class Known:
    """A number as it is shown.

    Attributes:
        value: to sort by; NaN where nothing is known.
        sd: the standard deviation over cells; empty for a single one.
        interval: over test samples; empty where there is none.
        samples: test samples behind a measure, in one cell; 0 for what is no measure.
    """

    value: float = NAN
    text: str = ""
    sd: str = ""
    interval: str = ""
    samples: int = 0

    @property
    def is_known(self) -> bool:
        """Whether there is a number."""
        return bool(np.isfinite(self.value))


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column.

    Attributes:
        unit: ``points`` and the like; empty where the number carries its own.
        of: the number of a series.
        of_base: the number of the untouched model, from the row 0 of a series; None where it has none.
    """

    label: str
    unit: str
    meaning: str
    is_higher_better: bool
    of: Callable[[Series], Known]
    of_base: Callable[[Series], Known] | None = None


def filled(series: Sequence[Series], columns: Sequence[Column]) -> list[tuple[Column, list[Known]]]:
    """Those of `columns` of which something is known for one of `series`, with the number of each series."""
    found = [(column, [column.of(one) for one in series]) for column in columns]
    return [(column, numbers) for column, numbers in found if any(known.is_known for known in numbers)]


def measured(name: str) -> Column:
    """A measure of the score matrix."""
    one = MEASURES[name]
    base = _base_score if name == "average_score" else None
    return Column(
        label=one.label, unit=one.unit, meaning=one.meaning, is_higher_better=one.higher_is_better, of=partial(_measure, one), of_base=base
    )


def _measure(measure: Measure, series: Series) -> Known:
    over, digits = series.spread(measure.name), 3 if measure.unit == "bits" else 1
    known = _known(over.mean, over.sd, series.interval(measure.name), scale=measure.scale, digits=digits, is_signed=measure.is_signed)
    return replace(known, samples=series.num_samples(measure.name)) if known.is_known else known


def _known(mean: float, sd: float, interval: Interval | None, *, scale: float = 100.0, digits: int = 1, is_signed: bool = False) -> Known:
    if not np.isfinite(mean):
        return Known()
    return Known(
        value=mean,
        text=show(mean * scale, digits=digits, is_signed=is_signed),
        sd=show(sd * scale, digits=digits) if np.isfinite(sd) else "",
        interval=show_interval(interval, scale=scale, digits=digits),
    )


def _of_rows(function: Callable[[Member, np.ndarray], np.ndarray], series: Series, *, is_signed: bool = False) -> Known:
    """A number of each member's score matrix, given with any axes before rows and columns, over the cells of a series."""
    if not series.members:
        return Known()
    values = np.array([function(member, member.matrix.rows) for member in series.members])
    draws = [function(member, member.resampled_rows) for member in series.members]
    sd = float(values.std(ddof=1)) if len(values) > 1 else NAN
    return _known(float(values.mean()), sd, percentile_interval(np.mean(draws, axis=0)), is_signed=is_signed)


def gained(member: Member, rows: np.ndarray) -> np.ndarray:
    """The mean over tasks seen of R[T, j] - R[0, j], of score matrices [..., rows, columns]; NaN without a task."""
    seen = member.matrix.seen
    return (rows[..., -1, seen] - rows[..., 0, seen]).mean(-1) if len(seen) else np.full(rows.shape[:-2], np.nan)


def _base_score(series: Series) -> Known:
    return _of_rows(
        lambda member, rows: rows[..., 0, member.matrix.seen].mean(-1) if len(member.matrix.seen) else NAN * rows[..., 0, 0], series
    )


NEW_SKILL = Column(
    label="New skill",
    unit="points",
    meaning="Mean over tasks seen: score at the end minus that of the untouched base model. What was learnt and is still there.",
    is_higher_better=True,
    of=partial(_of_rows, gained, is_signed=True),
)


def family_of(name: str) -> str:
    """What the name of a probe task begins with, before the first ``_``."""
    return name.partition("_")[0]


def probe_families(series: Sequence[Series]) -> list[str]:
    """What the probe tasks' names begin with, before the first ``_``."""
    names = [name for one in series for member in one.members for name in member.matrix.base_tasks if name in member.matrix.probe_tasks]
    return list(dict.fromkeys(map(family_of, names)))


def probe_columns(family: str) -> list[Column]:
    """The mean score over a family of probe tasks, and what learning changed in it."""

    def score(member: Member, rows: np.ndarray, *, row: int = -1) -> np.ndarray:
        matrix = member.matrix
        own = [matrix.names.index(name) for name in matrix.base_tasks if name in matrix.probe_tasks and family_of(name) == family]
        return rows[..., row, own].mean(-1) if own else np.full(rows.shape[:-2], np.nan)

    def change(member: Member, rows: np.ndarray) -> np.ndarray:
        return score(member, rows) - score(member, rows, row=0) if member.matrix.num_learnt else np.full(rows.shape[:-2], np.nan)

    label = family.upper()
    meaning = f"Mean over the probe tasks {family}_…, which no measure counts"
    return [
        Column(label=label, unit="points", meaning=f"{meaning}.", is_higher_better=True, of=partial(_of_rows, score),
               of_base=partial(_of_rows, partial(score, row=0))),
        Column(label=f"{label}, change", unit="points", meaning=f"{meaning}: at the end minus the base model, paired.",
               is_higher_better=True, of=partial(_of_rows, change, is_signed=True)),
    ]  # fmt: skip


def _shift(series: Series, *, is_change: bool = False, of_base: bool = False) -> Known:
    """The attention shift over cells; its interval is over test samples, mean over cells for each."""
    found = [pair for member in series.members if (pair := shifts_of_cell(member.cell, member.arm))]
    cells = [now - before if is_change else before if of_base else now for now, before in found]
    if not cells or len({len(cell) for cell in cells}) > 1:
        return Known()
    is_known = np.isfinite(np.array(found)).all(axis=(0, 1))  # samples with a shift in every cell, before and after
    if not is_known.any():
        return Known()
    values = np.array(cells)[:, is_known]
    means = values.mean(axis=1)
    sd = float(means.std(ddof=1)) if len(means) > 1 else NAN
    interval = bootstrap_interval(values.mean(axis=0))
    return _known(float(means.mean()), sd, interval, scale=1, digits=3, is_signed=is_change)


ATTENTION = Column(
    label="Attention shift",
    unit="0 to 2",
    meaning="1 − ρ of the attention on text before and after an image, over layers (Zhang et al. 2024, equation 1), at the end.",
    is_higher_better=False,
    of=_shift,
    of_base=partial(_shift, of_base=True),
)
ATTENTION_CHANGE = Column(
    label="Attention shift, change",
    unit="0 to 2",
    meaning="Attention shift at the end minus that of the base model, on the same samples.",
    is_higher_better=False,
    of=partial(_shift, is_change=True),
)


def cost_of(series: Series, key: str, *, is_total: bool = False, per_task: bool = False) -> float:
    """A number of cost.jsonl, mean over the cells that count: of the last line, or of all; NaN where it is not known.

    Args:
        per_task: divided by the tasks learnt, which for joint training are those of the stream.
    """
    counting = [member for member in series.members if member.cell.cost]
    if not counting or any(row.get(key) is None for member in counting for row in member.cell.cost):
        return NAN
    cells = [(member, [float(row[key]) for row in member.cell.cost]) for member in counting]
    totals = [sum(values) / (max(member.matrix.num_learnt, 1) if per_task else 1) for member, values in cells]
    return float(np.mean(totals if is_total or per_task else [values[-1] for _, values in cells]))


def _cost(key: str, shown: Callable[[float], str], series: Series, *, is_total: bool = False, per_task: bool = False) -> Known:
    value = cost_of(series, key, is_total=is_total, per_task=per_task)
    return Known(value=value, text=shown(value)) if np.isfinite(value) else Known()


TRAINED = Column(
    label="Trainable",
    unit="",
    meaning="Parameters that train while the last task is learnt.",
    is_higher_better=False,
    of=partial(_cost, "trainable_parameters", show_amount),
)
SECONDS = Column(
    label="Seconds a task",
    unit="",
    meaning="Training without scoring, mean over tasks and cells.",
    is_higher_better=False,
    of=partial(_cost, "seconds", partial(show, digits=0), per_task=True),
)
TIME = Column(
    label="Training time",
    unit="",
    meaning="Training of all tasks, without scoring; mean over cells.",
    is_higher_better=False,
    of=partial(_cost, "seconds", show_time, is_total=True),
)
STORED = Column(
    label="Stored",
    unit="",
    meaning="Bytes beside the base model, after the last task.",
    is_higher_better=False,
    of=partial(_cost, "stored_bytes", show_bytes),
)
