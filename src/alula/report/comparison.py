"""A run folder becomes the page of a comparison: what differs by more than noise, at which cost, and how it came about."""

from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np

from alula.evaluation.bootstrap import Interval, percentile_interval
from alula.files import write_text
from alula.report.curves import curve_views
from alula.report.definitions import METRICS
from alula.report.format import show, show_bytes, show_interval, show_time
from alula.report.pairs import pair_sentences, pair_view, pairs_of
from alula.report.pareto import Spot, mean_draws, scatter
from alula.report.reading import Run, read_run
from alula.report.sections import colour_of, link_to, summary_rows
from alula.report.series import Series, series_of
from alula.report.verdict import write_verdict

View = dict[str, object]
PAGE = "compare.html"
NEW_SKILL = "Mean over tasks seen: score at the end minus that of the untouched base model. What the stream added and is still there."


def build_comparison(run_folder: Path | str, *, out: Path | str | None = None) -> Path:
    """Writes the comparison page of a run and gives its path.

    Args:
        out: the HTML file; None for ``compare.html`` in the run folder. Links are relative to it.

    Raises:
        UserError: `run_folder` is not a run folder, or `out` cannot be written.
    """
    run = read_run(run_folder)
    page = Path(out) if out is not None else run.folder / PAGE
    loader = jinja2.PackageLoader("alula.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_text(page, environment.get_template("comparison.html.j2").render(comparison_view(run, page)))
    return page


def comparison_view(run: Run, page: Path) -> View:
    """Everything the template shows."""
    series = series_of(run)
    whole = [one for one in series if one.members and not one.is_partial and np.isfinite(one.spread("average_score").mean)]
    colours = {one.name: colour_of(index) for index, one in enumerate(series)}
    costs = {one.name: costs_of(one) for one in series}
    pairs = pairs_of(whole)
    rows, axis = summary_rows(series, colours)
    failed, waiting = ([cell for cell in run.cells if cell.state == state] for state in ("crashed", "unfinished"))
    report = run.folder / "report.html"
    return {
        "title": run.folder.resolve().name,
        "report": link_to(report, page) if report.exists() else "",
        "facts": _facts(run, series),
        "verdict": [
            *write_verdict(series, failed=[cell.name for cell in failed], waiting=[cell.name for cell in waiting]),
            *pair_sentences(pairs),
        ],
        "metrics": METRICS,
        "new_skill": NEW_SKILL,
        "axis": axis,
        "rows": [row | {"more": _more_cells(one, costs[one.name])} for row, one in zip(rows, series, strict=True)],
        "pairs": pair_view(whole, pairs),
        "plots": plots(whole, colours, costs),
        "curves": curve_views(series, colours),
        "legend": [{"name": one.name, "colour": colours[one.name]} for one in series],
        "failed": [
            {"name": cell.name, "error": cell.error.strip().split("\n")[0] or "no reason was written", "href": link_to(cell.folder, page)}
            for cell in failed
        ],
        "waiting": [{"name": cell.name, "href": link_to(cell.folder, page)} for cell in waiting],
    }


def _facts(run: Run, series: Sequence[Series]) -> list[tuple[str, str]]:
    orders = {member.cell.order: member.matrix.tasks for one in series for member in one.members}
    states = {state: sum(cell.state == state for cell in run.cells) for state in ("finished", "crashed", "unfinished")}
    facts = [
        ("Model", str(run.recipe.get("model", ""))),
        ("Orders" if len(orders) > 1 else "Tasks, in order", "; ".join(" → ".join(orders[order]) for order in sorted(orders))),
        ("Methods", ", ".join(dict.fromkeys(cell.method for cell in run.cells))),
        ("Seeds", ", ".join(str(seed) for seed in sorted({cell.seed for cell in run.cells}))),
        ("Cells", ", ".join(f"{count} {state}" for state, count in states.items() if count)),
    ]
    return [(label, text) for label, text in facts if text]


def costs_of(series: Series) -> dict[str, float]:
    """``seconds`` of training in all and ``bytes`` stored at the end, mean over the cells that count; NaN where unknown."""
    cells = [member.cell.cost for member in series.members if member.cell.cost]
    seconds = [sum(row.get("seconds") or 0.0 for row in rows) for rows in cells]
    stored = [float(rows[-1].get("stored_bytes") or np.nan) for rows in cells]
    return {"seconds": float(np.mean(seconds)) if cells else np.nan, "bytes": float(np.mean(stored)) if cells else np.nan}


def new_skill(series: Series) -> tuple[float, Interval | None]:
    """The mean over tasks seen of R[T, j] - R[0, j], over the cells of a series, and its interval over test samples."""
    values = [_gained(member.matrix.rows, member.matrix.seen) for member in series.members]
    draws = [_gained(member.resampled_rows, member.matrix.seen) for member in series.members]
    return float(np.mean(values)) if values else float("nan"), percentile_interval(mean_draws(draws))


def _gained(rows: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """From score matrices [..., rows, columns]; NaN without a task."""
    return (rows[..., -1, seen] - rows[..., 0, seen]).mean(-1) if len(seen) else np.full(rows.shape[:-2], np.nan)


def _more_cells(series: Series, costs: dict[str, float]) -> list[View]:
    """New skill and cost: the columns after the measures."""
    value, interval = new_skill(series)
    shown = [
        (value, show(100 * value, is_signed=True), show_interval(interval)),
        (costs["seconds"], show_time(costs["seconds"]), ""),
        (costs["bytes"], show_bytes(costs["bytes"]), ""),
    ]
    return [{"sort": number if np.isfinite(number) else "", "text": text, "interval": detail} for number, text, detail in shown]


def plots(series: Sequence[Series], colours: dict[str, int], costs: dict[str, dict[str, float]]) -> list[View]:
    """Average score against training time and stored bytes; base forgetting against new skill."""
    is_long = max((costs[one.name]["seconds"] for one in series), default=0.0) >= 180
    by_time = [_against_cost(one, colours, costs[one.name]["seconds"] / (60 if is_long else 1)) for one in series]
    by_size = [_against_cost(one, colours, costs[one.name]["bytes"]) for one in series]
    skill = [_against_skill(one, colours) for one in series]
    score = "average score, points ↑ better"
    drawn = [
        (
            "Score kept against training time",
            scatter(
                _finite(by_time), x_label=f"← better, {'minutes' if is_long else 'seconds'} in all", y_label=score,
                x_unit=_plain, y_unit=_plain,
                description="average score against training time",
            ),
        ),
        (
            "Score kept against what is stored",
            scatter(
                _finite(by_size), x_label="← better, stored beside the base model", y_label=score, x_unit=show_bytes, y_unit=_plain,
                description="average score against stored bytes",
            ),
        ),
        (
            "Base forgetting against new skill",
            scatter(
                _finite(skill), x_label="new skill, points → better", y_label="base forgetting, points ↓ better", x_unit=_plain,
                y_unit=_plain, description="base forgetting against new skill",
                is_lower_x_better=False, is_lower_y_better=True,
            ),
        ),
    ]  # fmt: skip
    return [{"title": title, "svg": svg} for title, svg in drawn if svg]


def _against_cost(series: Series, colours: dict[str, int], cost: float) -> Spot:
    return Spot(
        label=series.name,
        colour=colours[series.name],
        x=cost,
        y=100 * series.spread("average_score").mean,
        y_interval=_points(series.interval("average_score")),
        is_reference=series.is_reference,
    )


def _against_skill(series: Series, colours: dict[str, int]) -> Spot:
    gained, interval = new_skill(series)
    return Spot(
        label=series.name,
        colour=colours[series.name],
        x=100 * gained,
        y=100 * series.spread("base_forgetting").mean,
        x_interval=_points(interval),
        y_interval=_points(series.interval("base_forgetting")),
        is_reference=series.is_reference,
    )


def _points(interval: Interval | None) -> Interval | None:
    return interval and Interval(low=100 * interval.low, high=100 * interval.high, level=interval.level)


def _plain(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _finite(spots: Sequence[Spot]) -> list[Spot]:
    return [spot for spot in spots if np.isfinite(spot.x) and np.isfinite(spot.y)]
