"""Learning curves: the score on each task after each row of the score matrix, a line for each series."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from alula.report.figures import Line, line_chart
from alula.report.format import show
from alula.report.members import Member
from alula.report.series import Series, all_joint

View = dict[str, object]


def curve_views(series: Sequence[Series], colours: dict[str, int]) -> list[View]:
    """For each order of the tasks a chart for each task and base task; the mean over its seeds.

    None where every series learnt all tasks at once, or there is one task: there is no way there to show.
    """
    if all_joint(series):
        return []
    orders = sorted({order for one in series for order in one.orders})
    return [view for order in orders if (view := _order_view(series, colours, order))["charts"]]


def _order_view(series: Sequence[Series], colours: dict[str, int], order: int) -> View:
    """The charts of one order; a series that did not run it, or is still on its way, has no line."""
    shown = [(one, members) for one in series if (members := _alike(one, order))]
    if not shown:
        return {"charts": []}
    matrix = max((members[0].matrix for _, members in shown), key=lambda matrix: len(matrix.names))
    if len(matrix.tasks) < 2:
        return {"charts": []}
    labels, numbers = ["base", *matrix.tasks], {one.name: number for number, one in enumerate(series, start=1)}
    charts = []
    for name in matrix.names:
        is_bits, is_base = name in matrix.bits_tasks, name in matrix.base_tasks
        lines = [
            Line(
                label=one.name,
                colour=colours[one.name],
                points=_points(members, name, scale=1.0 if is_bits else 100.0),
                is_dashed=one.is_reference,
                number=numbers[one.name],
            )
            for one, members in shown
        ]
        unit = partial(show, digits=2 if is_bits else 0)
        learnt = None if is_base else matrix.tasks.index(name) + 1
        drawn = line_chart(lines, x_labels=labels, unit=unit, description=f"score on {name}", learnt=learnt, from_zero=not is_base)
        note = "bits a byte, lower is better" if is_bits else "points"
        if is_base:
            note += "; with examples in the prompt" if name in shown[0][1][0].cell.shots else "; base task, never trained"
        charts.append({"title": name, "note": note, "svg": drawn})
    return {
        "title": " → ".join(matrix.tasks),
        "order": order,
        "seeds": len({member.cell.seed for _, members in shown for member in members}),
        "charts": [chart for chart in charts if chart["svg"]],
    }


def _alike(series: Series, order: int) -> list[Member]:
    """The members of one order that are as far as the first of them."""
    own = [member for member in series.members if member.cell.order == order]
    return [one for one in own if one.matrix.names == own[0].matrix.names and one.matrix.rows.shape == own[0].matrix.rows.shape]


def _points(members: Sequence[Member], name: str, *, scale: float) -> tuple[tuple[float, float], ...]:
    matrix = members[0].matrix
    if name not in matrix.names:
        return ()
    values = np.mean([member.matrix.rows[:, matrix.names.index(name)] for member in members], axis=0)
    if all(member.is_single_stage for member in members) and np.isfinite(values[-1]):  # one score is no way there: a level to reach
        return (1.0, scale * float(values[-1])), (float(len(values) - 1), scale * float(values[-1]))
    return tuple((float(stage), scale * float(value)) for stage, value in enumerate(values) if np.isfinite(value))
