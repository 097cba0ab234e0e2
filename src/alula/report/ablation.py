"""A grid's folder becomes the page of an ablation: what each factor adds, whether noise could explain it, what is more than a sum."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alula.report.effects_plot import effects_chart
from alula.report.findings import judged, write_findings
from alula.report.format import UNKNOWN, show, show_time
from alula.report.grid_folder import Ablation, Point, read_ablation
from alula.report.outcomes import Factor, Outcome, outcomes_of, shown
from alula.report.page import write_page
from alula.report.sections import colour_of, link_to
from alula.report.shares import share_view

View = dict[str, object]
PAGE = "ablate.html"


def build_ablation(folder: Path | str, *, out: Path | str | None = None) -> Path:
    """Writes the page of a grid, finished or not, and gives its path.

    Args:
        out: the HTML file; None for ``ablate.html`` in the folder. Links are relative to it.

    Raises:
        UserError: `folder` is no grid's folder, or `out` cannot be written.
    """
    ablation = read_ablation(folder)
    page = Path(out) if out is not None else ablation.folder / PAGE
    return write_page(page, "ablation.html.j2", ablation_view(ablation, page))


def damaged_files(folder: Path | str) -> list[str]:
    """What of a grid's folder cannot be read, one sentence each, by point.

    Raises:
        UserError: `folder` is no grid's folder.
    """
    return [f"{point.label}: {text}" for point in read_ablation(folder).points for text in dict.fromkeys(point.problems)]


def ablation_view(ablation: Ablation, page: Path) -> View:
    """Everything the template shows."""
    outcomes = outcomes_of(ablation)
    cells = [cell for point in ablation.points for cell in point.cells]
    colours = {name: colour_of(index) for index, name in enumerate(ablation.about["factors"])}
    states = {state: sum(cell.state == state for cell in cells) for state in ("finished", "crashed", "unfinished")}
    facts = [
        ("Factors", "; ".join(f"{name}: {', '.join(levels)}" for name, levels in ablation.about["factors"].items())),
        ("Design", ablation.about["design"].replace("_", " ")),
        ("Points", f"{len(ablation.whole)} of {len(ablation.points)} with a finished cell"),
        ("Cells", ", ".join(f"{count} {state}" for state, count in states.items() if count)),
        *([("Groups", "; ".join(f"{name}: {', '.join(tasks)}" for name, tasks in ablation.groups.items()))] if ablation.groups else []),
    ]
    main = [one for one in outcomes if one.is_asked or one.is_group]
    steps = [_step_table(name, main) for name in ablation.steps if main and name in {factor.name for factor in main[0].factors}]
    opened = [one for one in main if one.is_asked or not steps]
    return {
        "title": ablation.folder.resolve().name,
        "facts": facts,
        "verdict": write_findings(ablation, outcomes),
        "outcomes": [_outcome_view(one, colours) for one in opened],
        "others": [_outcome_view(one, colours) for one in outcomes if one not in opened],
        "steps": steps,
        "shares": share_view([cell for cell in cells if cell.state == "finished"], groups=ablation.groups),
        "factors": list(ablation.about["factors"]),
        "score": _score_head(outcomes[0]) if outcomes else None,
        "points": [_point_view(point, page, outcomes[0].cells.get(point.label, []) if outcomes else []) for point in ablation.points],
        "failed": [
            {"name": c.name, "error": c.error.split("\n")[0], "href": link_to(c.folder, page)} for c in cells if c.state == "crashed"
        ],
        "one_at_a_time": ablation.about["design"] == "one_at_a_time",
    }


def _outcome_view(outcome: Outcome, colours: dict[str, int]) -> View:
    return {
        "name": outcome.name,
        "unit": outcome.unit,
        "better": "higher" if outcome.is_higher_better else "lower",
        "grand": show(outcome.grand),
        "samples": outcome.num_samples,
        "svg": effects_chart(outcome, colours),
        "rows": effect_rows(outcome),
        "interactions": [
            {"name": one.name, "value": show(one.value, is_signed=True), "interval": shown(one.interval), "is_clear": one.is_clear}
            for one in outcome.interactions[:6]
        ],
    }


def _step_table(name: str, outcomes: Sequence[Outcome]) -> View:
    """A row for each level of a factor, in their order; a column for each outcome, with the level's mean and its step."""
    factors = [next(factor for factor in outcome.factors if factor.name == name) for outcome in outcomes]
    rows = [
        {"level": effect.level, "cells": effect.num_cells, "values": [_step_cell(factor, place) for factor in factors]}
        for place, effect in enumerate(factors[0].effects)
    ]
    heads = [{"name": one.name, "unit": one.unit, "samples": one.num_samples} for one in outcomes]
    return {"name": name, "heads": heads, "rows": rows}


def _step_cell(factor: Factor, place: int) -> View:
    """The mean of a level and, of all but the first, the step to it."""
    mean = show(factor.effects[place].mean)
    if not place:
        return {"mean": mean, "step": ""}
    step = factor.steps[place - 1]
    return {"mean": mean, "step": f"{show(step.value, is_signed=True)} {shown(step.interval)}".strip(), "is_clear": step.is_clear}


def effect_rows(outcome: Outcome) -> list[dict[str, str]]:
    """A line for each level, the factor that matters most first."""
    return [
        {
            "factor": factor.name,
            "level": effect.level,
            "effect": show(effect.value, is_signed=True),
            "interval": shown(effect.interval),
            "mean": show(effect.mean),
            "cells": str(effect.num_cells),
            "judged": judged(effect),
        }
        for factor in outcome.factors
        for effect in factor.effects
    ]


def _step_rows(factor: Factor) -> list[dict[str, str]]:
    return [
        {"factor": factor.name, "from": step.before, "to": step.level, "step": show(step.value, is_signed=True),
         "interval": shown(step.interval), "judged": judged(step)}
        for step in factor.steps
    ]  # fmt: skip


def _score_head(outcome: Outcome) -> View:
    """The heading of the points' scores."""
    up, first = ("↑", "descending") if outcome.is_higher_better else ("↓", "ascending")
    return {"name": outcome.name, "unit": f"{outcome.unit}, {up} better", "first": first}


def _point_view(point: Point, page: Path, scores: Sequence[float]) -> View:
    """A line of the table of points; `scores` are those of its cells."""
    seconds = [sum(row.get("seconds") or 0 for row in member.cell.cost) for member in point.members]
    return {
        "label": point.label,
        "levels": list(point.levels.values()),
        "href": link_to(point.folder, page),
        "score": show(float(np.mean(scores))) if scores else UNKNOWN,
        "sort": float(np.mean(scores)) if scores else "",
        "sd": show(float(np.std(scores, ddof=1))) if len(scores) > 1 else "",
        "cells": f"{len(point.members)} of {len(point.cells)}",
        "time": show_time(float(np.mean(seconds))) if seconds else UNKNOWN,
        "seconds": float(np.mean(seconds)) if seconds else "",
    }


def ablation_tables(folder: Path | str) -> str:
    """The effects of a grid, finished or not, as tables in Markdown: one for each outcome, after what may be said.

    Raises:
        UserError: `folder` is no grid's folder.
    """
    ablation = read_ablation(folder)
    outcomes = outcomes_of(ablation)
    lines = [f"- {sentence.striptags()}" for sentence in write_findings(ablation, outcomes)]
    for outcome in outcomes:
        better = "higher" if outcome.is_higher_better else "lower"
        unit = f"{outcome.unit}, {better} is better, n = {outcome.num_samples}"
        lines += ["", f"{outcome.name} ({unit}), grand mean {show(outcome.grand)}:", ""]
        lines += _table(effect_rows(outcome))
        lines += [line for factor in outcome.factors if factor.steps for line in ("", *_table(_step_rows(factor)))]
    return "\n".join([*lines, ""])


def _table(rows: Sequence[dict[str, str]]) -> list[str]:
    heads = list(rows[0]) if rows else []
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *(list(row.values()) for row in rows)) if cells]
