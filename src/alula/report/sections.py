"""The tables of a report as plain values for the template: summary, score matrices, stages, cost."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from alula.evaluation.measures import MEASURES, Measure
from alula.report.definitions import METRICS, OTHER_METRICS
from alula.report.figures import NUM_COLOURS, Line, interval_bar, line_chart
from alula.report.format import UNKNOWN, show, show_amount, show_bytes, show_interval, show_time
from alula.report.members import Member
from alula.report.reading import Row, Run
from alula.report.series import Series, reference_of

View = dict[str, object]


def colour_of(index: int) -> int:
    """The palette number of the series or expert at `index`; after the last they come again."""
    return index % NUM_COLOURS + 1


def link_to(path: Path, page: Path) -> str:
    """The address of `path` relative to the folder of `page`."""
    return quote(Path(os.path.relpath(path, page.parent)).as_posix())


def summary_rows(series: Sequence[Series], colours: dict[str, int]) -> tuple[list[View], str]:
    """A row for each series: the main measures with spread, interval and sample count, and a bar of the average score.

    The second value is what the axis of the bars spans.
    """
    known = [one for one in series if np.isfinite(one.spread("average_score").mean)]
    ends = [value for one in known for value in _ends(one)]
    low = np.floor(10 * min(ends, default=0.0)) / 10
    high = np.ceil(10 * max(ends, default=1.0)) / 10
    rows = []
    for one in series:
        each = [member.summaries["average_score"] for member in one.members]
        colour, mean = colours[one.name], one.spread("average_score").mean
        interval = one.interval("average_score")
        bar = interval_bar(mean, interval=interval, seeds=each, low=low, high=high, colour=colour) if np.isfinite(mean) else ""
        rows.append(
            {
                "name": one.name,
                "colour": colour,
                "is_reference": one.is_reference,
                "is_partial": one.is_partial,
                "stage": max((member.matrix.num_learnt for member in one.members), default=0),
                "counted": one.counted,
                "cells": [_summary_cell(one, metric) for metric in METRICS],
                "bar": bar,
            }
        )
    return rows, f"{show(100 * low, digits=0)} to {show(100 * high, digits=0)}"


def _ends(series: Series) -> list[float]:
    interval = series.interval("average_score")
    values = [member.summaries["average_score"] for member in series.members]
    return values + ([interval.low, interval.high] if interval else [])


def measure_view(series: Sequence[Series]) -> View:
    """Every measure of every series, a row each; what no series has is left out."""
    rows = [(one, [_summary_cell(each, one) for each in series]) for one in (*METRICS, *OTHER_METRICS)]
    against = {name: reference_of(series, name) for name in dict.fromkeys(one.against for one in MEASURES.values() if one.against)}
    return {
        "heads": [one.name for one in series],
        "lines": [{"measure": one, "cells": cells} for one, cells in rows if any(cell["samples"] for cell in cells)],
        "against": [(name, reference.name) for name, reference in against.items() if reference is not None],
    }


def _summary_cell(series: Series, metric: Measure) -> View:
    digits = 3 if metric.unit == "bits" else 1
    over, interval = series.spread(metric.name), series.interval(metric.name)
    samples = series.num_samples(metric.name)
    extremes = _extremes("cells" if len(series.orders) > 1 else "seeds", (over.min, over.max), metric.scale, digits)
    if len(series.orders) > 1:
        extremes += "; " + _extremes("means of orders", series.by_order(metric.name), metric.scale, digits)
    return {
        "text": show(over.mean * metric.scale, digits=digits, is_signed=metric.is_signed),
        "sd": show(over.sd * metric.scale, digits=digits) if np.isfinite(over.sd) else "",
        "interval": show_interval(interval, scale=metric.scale, digits=digits),
        "samples": samples if np.isfinite(over.mean) else 0,
        "sort": over.mean if np.isfinite(over.mean) else -1e9,
        "title": f"{metric.meaning} Here: {series.counted}, {samples} samples a cell, {extremes}.",
    }


def _extremes(what: str, values: Sequence[float], scale: float, digits: int) -> str:
    return f"{what} from {show(min(values) * scale, digits=digits)} to {show(max(values) * scale, digits=digits)}" if values else ""


def matrix_views(series: Sequence[Series], colours: dict[str, int], page: Path) -> list[View]:
    """The score matrix of each series as a heat map, every number with the path of its predictions."""
    return [_matrix_view(one, colours[one.name], page) for one in series if one.members]


def _matrix_view(series: Series, colour: int, page: Path) -> View:
    members, rows = series.alike(), series.mean_rows()
    matrix = members[0].matrix
    labels = ["base model", *(f"after {name}" for name in matrix.tasks)]
    lines = []
    for stage in range(len(rows)):
        if not np.isfinite(rows[stage]).any():
            continue
        cells = [_matrix_cell(members, rows, stage, column, page) for column in range(len(matrix.names))]
        is_joint = members[0].is_single_stage and stage > 0
        lines.append({"label": "after all tasks" if is_joint else labels[stage], "cells": cells})
    return {
        "name": series.name,
        "colour": colour,
        "heads": [{"name": n, "is_base": n in matrix.base_tasks, "count": int(matrix.counts[i])} for i, n in enumerate(matrix.names)],
        "lines": lines,
        "num_seeds": len(members),
        "other_orders": len(series.members) - len(members),
        "links": [{"label": member.cell.shown, "href": link_to(member.cell.folder / "predictions", page)} for member in series.members],
    }


def _matrix_cell(members: list[Member], rows: np.ndarray, stage: int, column: int, page: Path) -> View:
    matrix = members[0].matrix
    name, value = matrix.names[column], float(rows[stage, column])
    if not np.isfinite(value):
        return {"text": UNKNOWN, "kind": "empty"}
    is_bits = name in matrix.bits_tasks
    unread = sum(member.unparsed.get((stage, name), 0) for member in members)
    is_joint = members[0].is_single_stage
    kind = (
        ""
        if is_joint
        else "learnt"
        if name in matrix.tasks and stage == column + 1
        else "future"
        if stage <= column < len(matrix.tasks)
        else ""
    )
    each = ", ".join(show(member.matrix.rows[stage, column] * (1 if is_bits else 100)) for member in members)
    path = members[0].sources.get((stage, name))
    return {
        "text": show(value, digits=3) if is_bits else show(100 * value, digits=0),
        "shade": 0 if is_bits else round(100 * min(max(value, 0.0), 1.0)),
        "kind": kind + (" base" if name in matrix.base_tasks else ""),
        "href": link_to(path, page) if path and path.exists() else None,
        "title": f"{name}: {each} (each seed), n = {matrix.counts[column]}, unparsed {unread}",
    }


def stage_charts(series: Sequence[Series], colours: dict[str, int]) -> list[View]:
    """Average score over the tasks seen, and over base tasks, after each stage."""
    whole = [one for one in series if one.members]
    if not whole:
        return []
    tasks = whole[0].members[0].matrix.tasks
    several = any(len(one.orders) > 1 for one in whole)
    labels = [str(stage) for stage in range(1, len(tasks) + 1)] if several else tasks
    note = "points, by number of tasks" if several else "points, after each task"
    charts: list[View] = []
    for title, is_base in (("Average score on the tasks seen", False), ("Average score on base tasks", True)):
        lines = [
            Line(label=one.name, colour=colours[one.name], points=_stage_points(one, is_base), is_dashed=one.is_reference) for one in whole
        ]
        drawn = line_chart(lines, x_labels=["base", *labels], unit=lambda value: show(value, digits=0), description=title)
        charts.append({"title": title, "note": note, "svg": drawn})
    return [chart for chart in charts if chart["svg"]]


def _stage_points(series: Series, is_base: bool) -> tuple[tuple[float, float], ...]:
    matrices = [member.matrix for member in series.members if len(member.matrix.rows) == len(series.members[0].matrix.rows)]
    points = []
    for stage in range(0 if is_base else 1, len(matrices[0].rows)):
        values = []
        for matrix in matrices:
            names = matrix.base_tasks if is_base else matrix.tasks[:stage]
            columns = [matrix.names.index(name) for name in names if name not in matrix.bits_tasks | matrix.probe_tasks]
            values.append(float(matrix.rows[stage, columns].mean()) if columns else float("nan"))
        value = float(np.mean(values))
        if np.isfinite(value):
            points.append((float(stage), 100 * value))
    return tuple(points)


COSTS = (
    ("samples_seen", "Samples seen", "for each task", show_amount),
    ("minutes", "Training time", "minutes, for each task", lambda value: show(value, digits=0 if value >= 10 else 1)),
    ("trainable_parameters", "Trainable parameters", "while the task is learnt", show_amount),
    ("stored_bytes", "Stored beside the base model", "after the task", show_bytes),
)


def cost_view(run: Run, colours: dict[str, int]) -> View:
    """What each method costs against the number of tasks, mean over its cells: charts and totals."""
    methods: dict[str, list[list[Row]]] = {}
    done = {cell.method for cell in run.cells if cell.state == "finished"}
    for cell in run.cells:
        if cell.cost and (cell.state == "finished" or cell.method not in done):
            rows = [row | {"minutes": (row.get("seconds") or 0) / 60} for row in cell.cost]
            methods.setdefault(cell.method, []).append(rows)
    if not methods:
        return {"charts": [], "lines": []}
    most = max(len(rows) for cells in methods.values() for rows in cells)
    charts = []
    for key, title, note, unit in COSTS:
        lines = [Line(label=name, colour=colours.get(name, 1), points=_cost_points(cells, key, most)) for name, cells in methods.items()]
        drawn = line_chart(lines, x_labels=["", *(str(i + 1) for i in range(most))], unit=unit, description=title)
        charts.append({"title": title, "note": f"{note}, by number of tasks", "svg": drawn})
    totals = [_cost_totals(name, cells, colours.get(name, 1)) for name, cells in methods.items()]
    return {"charts": [chart for chart in charts if chart["svg"]], "lines": totals}


def _cost_points(cells: list[list[Row]], key: str, most: int) -> tuple[tuple[float, float], ...]:
    points = []
    for index in range(max(len(rows) for rows in cells)):
        values = [rows[index][key] for rows in cells if index < len(rows) and rows[index].get(key) is not None]
        is_joint = all(len(rows) == 1 for rows in cells)
        if values:
            points.append((float(most if is_joint else index + 1), float(np.mean(values))))
    return tuple(points)


def _cost_totals(name: str, cells: list[list[Row]], colour: int) -> View:
    def total(key: str) -> float:
        return float(np.mean([sum(row.get(key) or 0 for row in rows) for rows in cells]))

    def last(key: str) -> float:
        return float(np.mean([rows[-1].get(key) or 0 for rows in cells]))

    values = [
        (show_amount(total("samples_seen")), total("samples_seen")),
        (show_amount(total("optimizer_targets")), total("optimizer_targets")),
        (show(total("steps"), digits=0), total("steps")),
        (show_time(total("seconds")), total("seconds")),
        (show_amount(last("trainable_parameters")), last("trainable_parameters")),
        (show_amount(last("stored_parameters")), last("stored_parameters")),
        (show_bytes(last("stored_bytes")), last("stored_bytes")),
    ]
    return {"name": name, "colour": colour, "cells": [{"text": text, "sort": value} for text, value in values]}
