"""What was lost and what was gained: each task at the end against right after learning it, with the answers that flipped."""

from collections.abc import Sequence

import numpy as np

from alula.evaluation.bootstrap import Interval, percentile_interval, resample_rows
from alula.files import read_jsonl
from alula.report.format import UNKNOWN, show, show_interval
from alula.report.members import Member
from alula.report.series import Series

View = dict[str, object]


def change_view(series: Sequence[Series]) -> View:
    """Per task and series: score at the end minus right after learning (base tasks: minus the base model's)."""
    shown = [one for one in series if one.members and any(np.isfinite(_start(one.members[0], n)) for n in _names(one))]
    names = list(dict.fromkeys(name for one in shown for name in _names(one)))
    lines = [{"task": name, "cells": [_change_cell(one, name) for one in shown]} for name in names]
    base = {name for one in shown for name in one.members[0].matrix.base_tasks if name not in one.members[0].cell.shots}
    return {"heads": [one.name for one in shown], "lines": [line | {"is_base": line["task"] in base} for line in lines]}


def _names(series: Series) -> tuple[str, ...]:
    matrix = series.members[0].matrix
    return matrix.tasks[: matrix.num_learnt] + matrix.base_tasks


def _first_stage(member: Member, name: str) -> int:
    """The row a task is compared with: right after it was learnt; the base model's for a base task."""
    return member.matrix.tasks.index(name) + 1 if name in member.matrix.tasks else 0


def _start(member: Member, name: str) -> float:
    stage = _first_stage(member, name)
    rows = member.matrix.rows
    return float(rows[stage, member.matrix.names.index(name)]) if stage < len(rows) else float("nan")


def _change_cell(series: Series, name: str) -> View:
    members = [m for m in series.members if name in m.matrix.names and name in _names(series)]
    starts = [_start(member, name) for member in members]
    is_joint = all(member.is_single_stage for member in members)
    if not members or not np.isfinite(starts).all() or (is_joint and name in members[0].matrix.tasks):
        return {"text": UNKNOWN, "kind": "empty"}
    stages = [_first_stage(member, name) for member in members]
    earlier = [i for i, member in enumerate(members) if stages[i] < member.matrix.num_learnt]
    if not earlier:
        return {"text": "learnt last", "kind": "empty"}
    # where another order has the task last nothing came after it, and nothing could be lost
    members, stages, starts = [members[i] for i in earlier], [stages[i] for i in earlier], [starts[i] for i in earlier]
    columns = [member.matrix.names.index(name) for member in members]
    samples = [member.samples[column] for member, column in zip(members, columns, strict=True)]
    flips = [(s.values[stage], s.values[-1]) for s, stage in zip(samples, stages, strict=True)]
    drawn = [resample_rows([s])[..., 0] for s in samples]
    interval = percentile_interval(np.mean([d[:, -1] - d[:, stage] for d, stage in zip(drawn, stages, strict=True)], axis=0))
    ends = [float(member.matrix.last[column]) for member, column in zip(members, columns, strict=True)]
    return _change_shown(float(np.mean(starts)), float(np.mean(ends)), flips, interval, is_bits=name in members[0].matrix.bits_tasks)


def _change_shown(start: float, end: float, flips: list[tuple], interval: Interval | None, *, is_bits: bool) -> View:
    lost = sum(int((then > now).sum()) for then, now in flips)
    gained = sum(int((then < now).sum()) for then, now in flips)
    is_clear = interval is not None and interval.excludes(0.0)
    scale, digits = (1.0, 3) if is_bits else (100.0, 1)
    counted = f"; lost {lost}, gained {gained} of {sum(len(then) for then, _ in flips)} answers"
    return {
        "text": show((end - start) * scale, digits=digits, is_signed=True),
        "detail": "bits a byte" if is_bits else f"−{lost} +{gained}",
        "kind": "" if not is_clear else "worse" if (end < start) != is_bits else "better",
        "strength": round(min(abs(end - start) * 100, 100)),
        "title": f"{show(start * scale, digits=digits)} → {show(end * scale, digits=digits)} "
        f"{show_interval(interval, scale=scale, digits=digits)}{'' if is_bits else counted}",
    }


def lost_answers(series: Sequence[Series], *, most: int = 2) -> list[View]:
    """Some samples that were right after learning and are wrong at the end, for each series and task."""
    found = []
    for one in series:
        for member in one.members[:1]:
            for column, name in enumerate(member.matrix.tasks[: member.matrix.num_learnt]):
                first = member.samples[column].values[column + 1], member.samples[column].values[-1]
                for index in np.flatnonzero(first[0] > first[1])[:most]:
                    found.append({"series": one.name, "task": name, **_answers(member, name, int(index), column + 1)})
    return found


def _answers(member: Member, name: str, index: int, stage: int) -> View:
    then, now = (read_jsonl(member.sources[row, name])[index] for row in (stage, member.matrix.num_learnt))
    return {"question": then["prompt"].replace("<image>", "").strip(), "reference": then["reference"],
            "then": then["output"], "now": now["output"], "is_parsed": now["parsed"]}  # fmt: skip
