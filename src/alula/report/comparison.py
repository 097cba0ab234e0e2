"""A run folder becomes the page of a comparison: what differs by more than noise, at which cost, and how it came about."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alula.evaluation.measures import MEASURES
from alula.report.by_task import TaskScores, scores_by_task, show_score, tasks_of
from alula.report.columns import ATTENTION_CHANGE, NEW_SKILL, STORED, TIME, Column, Known, filled, measured, probe_columns, probe_families
from alula.report.curves import curve_views
from alula.report.facts import facts_of
from alula.report.page import write_page
from alula.report.pairs import pair_sentences, pair_view, pairs_of
from alula.report.plots import plot_views
from alula.report.prompts import prompt_problems
from alula.report.reading import Run, read_run
from alula.report.sections import colour_of, link_to, summary_rows
from alula.report.series import Series, series_of
from alula.report.verdict import write_verdict

View = dict[str, object]
PAGE = "compare.html"
KINDS = ("base_forgetting_understanding", "base_forgetting_generation")
COMPARED = (
    *("average_score", "average_over_stages", "gap_to_joint", "backward_transfer", "forgetting"),
    *("base_forgetting", *KINDS, "base_bits_increase", "unparsed_share"),
)
"""The measures of the table, in its order."""


def build_comparison(run_folder: Path | str, *, out: Path | str | None = None) -> Path:
    """Writes the comparison page of a run, finished or not, and gives its path.

    Args:
        out: the HTML file; None for ``compare.html`` in the run folder. Links are relative to it.

    Raises:
        UserError: `run_folder` is not a run folder, or `out` cannot be written.
    """
    run = read_run(run_folder)
    page = Path(out) if out is not None else run.folder / PAGE
    return write_page(page, "comparison.html.j2", comparison_view(run, page))


def comparison_view(run: Run, page: Path) -> View:
    """Everything the template shows."""
    series = [one for one in series_of(run) if any(member.matrix.num_learnt for member in one.members)]
    whole = [one for one in series if one.members and not one.is_partial and np.isfinite(one.spread("average_score").mean)]
    numbers = {one.name: number for number, one in enumerate(series, start=1)}
    colours = {one.name: colour_of(index) for index, one in enumerate(series)}
    pairs = pairs_of(whole)
    failed, waiting = ([cell for cell in run.cells if cell.state == state] for state in ("crashed", "unfinished"))
    report = run.folder / "report.html"
    rows, axis = summary_rows(series, colours)
    columns = table_columns(series)
    return {
        "title": run.folder.resolve().name,
        "report": link_to(report, page) if report.exists() else "",
        "facts": facts_of(run, series),
        "verdict": [
            *write_verdict(series, failed=[cell.name for cell in failed], waiting=[cell.name for cell in waiting]),
            *pair_sentences(pairs),
            *prompt_problems(run.cells),
        ],
        "axis": axis,
        "columns": [column for column, _ in columns],
        "rows": [
            row | {"number": number, "known": [known[number - 1] for _, known in columns]} for number, row in enumerate(rows, start=1)
        ],
        "by_task": by_task_view(series, numbers),
        "pairs": pair_view(whole, pairs),
        "plots": plot_views(whole, numbers),
        "curves": curve_views(series, colours),
        "legend": [{"name": name, "number": number, "colour": colours[name]} for name, number in numbers.items()],
        "failed": [
            {"name": cell.name, "error": cell.error.strip().split("\n")[0] or "no reason was written", "href": link_to(cell.folder, page)}
            for cell in failed
        ],
        "waiting": [{"name": cell.name, "href": link_to(cell.folder, page)} for cell in waiting],
    }


def table_columns(series: Sequence[Series]) -> list[tuple[Column, list[Known]]]:
    """The columns of the sortable table that have a number, with that of each series.

    Base tasks of one kind, understanding or generation, are named by it: their mean would say the same again.
    """
    probes = [column for family in probe_families(series) for column in probe_columns(family)]
    found = filled(series, [*map(measured, COMPARED), NEW_SKILL, *probes, ATTENTION_CHANGE, TIME, STORED])
    kinds = {MEASURES[name].label for name in KINDS} & {column.label for column, _ in found}
    return [(column, known) for column, known in found if len(kinds) != 1 or column.label != MEASURES["base_forgetting"].label]


def by_task_view(series: Sequence[Series], numbers: dict[str, int]) -> View:
    """What each series scores on each task at the end, as shaded numbers."""
    tasks, base, bits = tasks_of(series)

    def cell(line: TaskScores, name: str) -> View:
        value = line.values.get(name)
        shade = 0 if value is None or name in bits else round(100 * value)
        return {"text": show_score(value, is_bits=name in bits), "shade": shade, "is_base": name in base}

    lines = [
        {"name": line.name, "number": numbers.get(line.name), "cells": [cell(line, name) for name in (*tasks, *base)]}
        for line in scores_by_task(series)
    ]
    heads = [{"name": name, "is_base": name in base, "is_bits": name in bits} for name in (*tasks, *base)]
    return {"heads": heads, "lines": [line for line in lines if len(lines) > 1]}
