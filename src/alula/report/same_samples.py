"""The last rows of several cells on the test samples that all of them share: levels are compared on nothing else."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup

from alula.evaluation.bootstrap import TaskSamples, resample_rows
from alula.report.members import Member
from alula.report.verdict import listed

FEW = 10
"""Samples that cells with different tests share at least; below that nothing is compared."""
TOLD = {
    "unscored": "In no effect, since not every cell scored them: {}.",
    "lost": "In no effect, since predictions of them are missing: {}.",
    "other": "In no effect, since the points were tested on other samples: {}.",
    "part": "Compared on the test samples that all points share: {}.",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SameSamples:
    """What cells can at the end, on equal terms.

    Attributes:
        names: the tasks; those that cannot be compared are not among them.
        learnt: of these those of the stream that are scored from 0 to 1.
        bits: of these those in bits per byte; `probes` likewise (see `ScoreMatrix`).
        counts: test samples of each task.
        points: of each cell the number of its point.
        values: the scores.
        draws: the same from resampled test samples, drawn alike for all cells.
        notes: what is left out, and why, in sentences.
    """

    names: tuple[str, ...]
    learnt: frozenset[str]
    bits: frozenset[str]
    probes: frozenset[str]
    counts: dict[str, int]
    points: Int[np.ndarray, " cells"]
    values: Float[np.ndarray, "cells tasks"]
    draws: Float[np.ndarray, "cells resamples tasks"]
    notes: tuple[Markup, ...]


def on_same_samples(points: Sequence[Sequence[Member]]) -> SameSamples:
    """What the cells of `points` have in common: of a task whose test samples are not the same everywhere those that are."""
    members = [member for point in points for member in point]
    columns: dict[str, list[TaskSamples]] = {}
    told: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(name for member in members for name in member.matrix.names):
        tests = [_ids(member, name) for member in members]
        shared = _shared([ids for ids in tests if ids])
        sizes = sorted({len(ids) for ids in tests if ids})
        if any(ids is None for ids in tests):
            told["unscored"].append(name)
        elif not all(tests):
            told["lost"].append(name)
        elif len(shared) < min(FEW, sizes[-1]):
            told["other"].append(f"{name} ({len(shared)} shared of {_span(sizes)})")
        else:
            if len(shared) < sizes[-1]:
                told["part"].append(f"{name} ({len(shared)} of {_span(sizes)})")
            columns[name] = [_last(member, name, shared) for member in members]
    rows = [[column[cell] for column in columns.values()] for cell in range(len(members))]
    seen = [{member.matrix.names[column] for column in member.matrix.seen} for member in members]
    return SameSamples(
        names=tuple(columns),
        learnt=frozenset(set.intersection(*seen) & set(columns)) if seen else frozenset(),
        bits=frozenset(name for member in members for name in member.matrix.bits_tasks),
        probes=frozenset(name for member in members for name in member.matrix.probe_tasks),
        counts={name: column[0].values.shape[1] for name, column in columns.items()},
        points=np.repeat(np.arange(len(points)), [len(point) for point in points]),
        values=np.array([[np.average(task.values[0], weights=task.weights) for task in row] for row in rows]),
        draws=np.array([resample_rows(row)[:, 0] for row in rows if row]),
        notes=tuple(Markup(TOLD[kind]).format(listed(names)) for kind, names in told.items()),
    )


def _ids(member: Member, name: str) -> tuple[str, ...] | None:
    """The samples that `name` was tested on in the last row; empty where predictions are missing, None where it was not scored."""
    if name not in member.matrix.names:
        return None
    column = member.matrix.names.index(name)
    return member.ids[column] if np.isfinite(member.matrix.last[column]) else None


def _shared(tests: Sequence[Sequence[str]]) -> list[str]:
    """What is in all of `tests`, in the order of the first."""
    common = set(tests[0]).intersection(*tests[1:]) if tests else set()
    return [one for one in dict.fromkeys(tests[0]) if one in common] if tests else []


def _last(member: Member, name: str, ids: Sequence[str]) -> TaskSamples:
    """The last row of one task on the samples `ids`."""
    column = member.matrix.names.index(name)
    task, places = member.samples[column], {one: place for place, one in enumerate(member.ids[column])}
    chosen = [places[one] for one in ids]
    weights = None if task.weights is None else task.weights[chosen]
    return TaskSamples(name=name, values=task.values[-1:, chosen], weights=weights)


def _span(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
