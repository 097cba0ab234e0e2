"""A run folder becomes one HTML file that needs nothing else. It reads finished files and is imported by nobody but the CLI."""

from pathlib import Path

from alula.report.attention_shift import attention_view
from alula.report.changes import change_view, lost_answers
from alula.report.definitions import METRICS, OTHER_METRICS, TERMS
from alula.report.facts import facts_of
from alula.report.page import write_page
from alula.report.prompts import prompt_problems, prompt_versions
from alula.report.reading import Run, read_run
from alula.report.routing import diagnosis_rows, example_views, expert_colours, routing_views
from alula.report.sections import (
    colour_of,
    cost_view,
    link_to,
    matrix_views,
    measure_view,
    stage_charts,
    summary_rows,
)
from alula.report.series import series_of
from alula.report.shares import share_view
from alula.report.sparse import sparse_view
from alula.report.verdict import write_verdict

View = dict[str, object]


def build_report(run_folder: Path | str, *, out: Path | str | None = None) -> Path:
    """Writes the report of a run and gives its path.

    What is missing in the folder is missing in the report: cells that run or crashed are listed as such.

    Args:
        out: the HTML file; None for ``report.html`` in the run folder. Links to predictions are relative to it.

    Raises:
        UserError: `run_folder` is not a run folder, or `out` cannot be written.
    """
    run = read_run(run_folder)
    page = Path(out) if out is not None else run.folder / "report.html"
    return write_page(page, "template.html.j2", report_view(run, page))


def report_view(run: Run, page: Path) -> View:
    """Everything the template shows."""
    series = series_of(run)
    colours = {one.name: colour_of(index) for index, one in enumerate(series)}
    by_method = {one.method: colours[one.name] for one in reversed(series)}
    rows, axis = summary_rows(series, colours)
    experts: dict[str, int] = {}
    if series and series[0].members:
        expert_colours(series[0].members[0].matrix.tasks, experts)
    problems = [*run.problems, *prompt_problems(run.cells), *(text for one in series for member in one.members for text in member.problems)]
    return {
        "title": run.folder.resolve().name,
        "facts": facts_of(run, series),
        "recipe": run.recipe_text,
        "versions": run.versions | prompt_versions(run.cells),
        "verdict": write_verdict(
            series,
            failed=[cell.name for cell in run.cells if cell.state == "crashed"],
            waiting=[cell.name for cell in run.cells if cell.state == "unfinished"],
        ),
        "metrics": METRICS,
        "other_metrics": OTHER_METRICS,
        "terms": TERMS,
        "summary": rows,
        "axis": axis,
        "every": measure_view(series),
        "charts": stage_charts(series, colours),
        "legend": [{"name": one.name, "colour": colours[one.name]} for one in series],
        "matrices": matrix_views(series, colours, page),
        "changes": change_view(series),
        "lost": lost_answers(series),
        "cost": cost_view(run, by_method),
        "routing": routing_views(series, experts),
        "diagnosis": diagnosis_rows(series),
        "shares": share_view(run.cells),
        "sparse": sparse_view(run.cells),
        "attention": attention_view(run.cells),
        "examples": example_views(run.cells, experts),
        "experts": [{"name": name, "colour": colour} for name, colour in experts.items()],
        "cells": [
            {"name": c.name, "state": c.state, "error": c.error, "stages": max((row["row"] for row in c.scores), default=0),
             "href": link_to(c.folder, page)} for c in run.cells
        ],
        "problems": list(dict.fromkeys(problems)),
    }  # fmt: skip
