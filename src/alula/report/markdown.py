"""A run folder becomes tables in Markdown, for a page of documentation: numbers with their noise, what they cost, every task."""

from collections.abc import Sequence
from pathlib import Path

from alula.report.by_task import UNTOUCHED, TaskScores, scores_by_task, show_score, tasks_of
from alula.report.columns import (
    ATTENTION,
    ATTENTION_CHANGE,
    SECONDS,
    STORED,
    TRAINED,
    Column,
    Known,
    filled,
    measured,
    probe_columns,
    probe_families,
)
from alula.report.format import UNKNOWN
from alula.report.reading import Run, read_run
from alula.report.series import Series, series_of

MEASURED = (
    *("average_score", "forgetting", "backward_transfer", "gap_to_joint", "base_forgetting_understanding", "base_forgetting_generation"),
    *("base_bits_increase", "unparsed_share"),
)


def markdown_tables(run_folder: Path | str) -> str:
    """The results of a run, finished or not: a line for each series, then the scores by task. A column without a number is left out.

    Raises:
        UserError: `run_folder` is not a run folder.
    """
    run = read_run(run_folder)
    series = [one for one in series_of(run) if any(member.matrix.num_learnt for member in one.members)]
    if not series:
        return "No task has been learnt yet.\n"
    return "\n".join([*_caption(run), "", *_results(series), "", *_by_task(series), ""])


def _caption(run: Run) -> list[str]:
    said = "Points unless said: mean ± standard deviation over cells (seeds and orders) [95 % interval over test samples]."
    named = {state: [cell.name for cell in run.cells if cell.state == state] for state in ("crashed", "unfinished")}
    missing = [f"{state.capitalize()}: {', '.join(names)}." for state, names in named.items() if names]
    return [" ".join([said, *missing])]


def _results(series: Sequence[Series]) -> list[str]:
    probes = [column for family in probe_families(series) for column in probe_columns(family)]
    columns = filled(series, [*map(measured, MEASURED), *probes, ATTENTION, ATTENTION_CHANGE, TRAINED, STORED, SECONDS])
    heads = [
        "",
        *(_head(column) for column, _ in columns),
        "n",
        "seeds",
        *(["orders"] if any(len(one.orders) > 1 for one in series) else []),
    ]
    lines = [[UNTOUCHED, *(_of_base(column, series) for column, _ in columns)]]
    for index, one in enumerate(series):
        name = f"{one.name} (unfinished)" if one.is_partial else one.name
        counts = [one.num_samples("average_score"), len(one.seeds), len(one.orders)]
        lines.append([name, *(_shown(known[index]) for _, known in columns), *map(str, counts)])
    return _table(heads, lines)


def _of_base(column: Column, series: Sequence[Series]) -> str:
    """Of the untouched model, from the first series that knows it; empty where the column says nothing of it."""
    if column.of_base is None:
        return ""
    return _shown(next((known for one in series if (known := column.of_base(one)).is_known), Known()))


def _head(column: Column) -> str:
    return column.label if column.unit in ("points", "") else f"{column.label} ({column.unit})"


def _shown(known: Known) -> str:
    if not known.is_known:
        return UNKNOWN
    return " ".join([known.text, *([f"± {known.sd}"] if known.sd else []), *([known.interval] if known.interval else [])])


def _by_task(series: Sequence[Series]) -> list[str]:
    tasks, base, bits = tasks_of(series)

    def cells(line: TaskScores) -> list[str]:
        return [line.name, *(show_score(line.values.get(name), is_bits=name in bits) for name in (*tasks, *base))]

    heads = ["at the end", *tasks, *base]
    return _table([f"{head} (bits per byte)" if head in bits else head for head in heads], [cells(line) for line in scores_by_task(series)])


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines may be shorter than the heading."""
    whole = [[*line, *[""] * (len(heads) - len(line))][: len(heads)] for line in lines]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (heads, ["---"] * len(heads), *whole)]
