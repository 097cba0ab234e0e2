"""A grid's folder becomes the page of an ablation: what each factor adds, whether noise could explain it, what is more than a sum."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alula.report.effects_plot import effects_chart
from alula.report.findings import write_findings
from alula.report.format import show, show_time
from alula.report.outcomes import Ablation, Outcome, Point, outcomes_of, read_ablation, shown
from alula.report.page import write_page
from alula.report.sections import colour_of, link_to

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
    ]
    return {
        "title": ablation.folder.resolve().name,
        "facts": facts,
        "verdict": write_findings(ablation, outcomes),
        "outcomes": [_outcome_view(one, colours) for one in outcomes],
        "factors": list(ablation.about["factors"]),
        "points": [_point_view(point, page) for point in ablation.points],
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
        "svg": effects_chart(outcome, colours),
        "rows": effect_rows(outcome),
        "interactions": [
            {"name": one.name, "value": show(one.value, is_signed=True), "interval": shown(one.interval), "is_clear": one.is_clear}
            for one in outcome.interactions[:6]
        ],
    }


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
            "judged": "more than noise" if effect.is_clear else "noise could explain it",
        }
        for factor in outcome.factors
        for effect in factor.effects
    ]


def _point_view(point: Point, page: Path) -> View:
    scores = [member.summaries["average_score"] for member in point.members]
    seconds = [sum(row.get("seconds") or 0 for row in member.cell.cost) for member in point.members]
    return {
        "label": point.label,
        "levels": list(point.levels.values()),
        "href": link_to(point.folder, page),
        "score": show(100 * float(np.mean(scores))) if scores else "–",
        "sort": float(np.mean(scores)) if scores else "",
        "sd": show(100 * float(np.std(scores, ddof=1))) if len(scores) > 1 else "",
        "cells": f"{len(point.members)} of {len(point.cells)}",
        "time": show_time(float(np.mean(seconds))) if seconds else "–",
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
        lines += ["", f"{outcome.name} ({outcome.unit}, {better} is better), grand mean {show(outcome.grand)}:", ""]
        lines += _table(effect_rows(outcome))
    return "\n".join([*lines, ""])


def _table(rows: Sequence[dict[str, str]]) -> list[str]:
    heads = list(rows[0]) if rows else []
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *(list(row.values()) for row in rows)) if cells]
