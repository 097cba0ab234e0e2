"""What may be said of an ablation, in sentences: nothing matters more than another thing that its noise could explain."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from alula.errors import counted
from alula.evaluation.bootstrap import percentile_interval
from alula.report.format import show
from alula.report.grid_folder import Ablation
from alula.report.outcomes import Estimate, Factor, Outcome, shown
from alula.report.verdict import listed

LEAST = 0.05
"""A difference that is shown as 0.0."""


def write_findings(ablation: Ablation, outcomes: Sequence[Outcome]) -> list[Markup]:
    """What may be said, in sentences: of every outcome that the grid names, the first one in full."""
    asked = [one for one in outcomes if one.is_asked]
    damaged = _damaged(ablation)
    if not asked or not asked[0].factors:
        few = Markup("Fewer than two points that can be compared have a finished cell: no effect is known yet.")
        return [few, *damaged, *ablation.scores.notes]
    said: list[Markup] = []
    for outcome in asked:
        where = Markup(" on the {}").format(outcome.name) if len(asked) > 1 else Markup("")
        said += [_most(outcome), *(_factor_sentence(outcome, factor, where) for factor in outcome.factors)]
        said += [_steps_sentence(outcome, factor, where) for factor in outcome.factors if factor.steps]
    last = [*_expected(ablation.about["expected"], asked[0]), *_interaction_sentence(asked[0])]
    if last and len(asked) > 1:
        last[0] = Markup("Of the {}: ").format(asked[0].name) + last[0]
    said += [*last, *_starts(ablation, asked[0])]
    crashed = [cell.name for point in ablation.points for cell in point.cells if cell.state == "crashed"]
    missing = [point.label for point in ablation.points if not point.members]
    return [
        *said,
        *damaged,
        *ablation.scores.notes,
        *([Markup("<b>Crashed</b>, and in no effect: {}.").format(listed(crashed))] if crashed else []),
        *([Markup("Without a finished cell, and in no effect: {}.").format(listed(missing))] if missing else []),
    ]


def _damaged(ablation: Ablation) -> list[Markup]:
    """Files that cannot be read, and what to do; what they hold is in no effect."""
    found = [f"{point.label}: {text}" for point in ablation.points for text in dict.fromkeys(point.problems)]
    said = Markup("<b>Damaged</b>, and what they hold in no effect: {} Delete the folder of each such cell and run the grid again.")
    return [said.format(" ".join(text.rstrip(".") + "." for text in found))] if found else []


def _most(outcome: Outcome) -> Markup:
    """Which factor matters most, and which it cannot be told apart from."""
    values = {value for cells in outcome.cells.values() for value in cells}
    if len(values) == 1:
        said = Markup("The {} is the same in every cell, {} {}: it tells no point from another. Train longer, or score bits.")
        return said.format(outcome.name, show(values.pop()), outcome.unit)
    first = next((factor for factor in outcome.factors if factor.gap.is_clear), None)
    if first is None:
        return Markup("No factor makes a difference to the {} that is more than noise.").format(outcome.name)
    others = [factor for factor in outcome.factors if factor is not first]
    said = Markup("The {} depends most on <b>{}</b>.").format(outcome.name, first.name)
    close = [other.name for other in others if np.isfinite(other.gap.value) and not _is_more(first, other)]
    return said + Markup(" It cannot be told apart from {} in that.").format(listed(close)) if close else said


def _is_more(first: Factor, second: Factor) -> bool:
    """Whether the larger of both differences is more than noise, and more than the other one."""
    interval = percentile_interval(np.round(first.draws - second.draws, 9))
    larger = max(first, second, key=lambda factor: factor.gap.value)
    return larger.gap.is_clear and interval is not None and interval.excludes(0.0)


def _amount(outcome: Outcome, estimate: Estimate, *, is_signed: bool = False) -> str:
    return f"{show(estimate.value, is_signed=is_signed)} {outcome.unit} {shown(estimate.interval)}".strip()


def judged(estimate: Estimate) -> str:
    """What may be said of a difference."""
    return "more than noise" if estimate.is_clear else "noise could explain it"


def _factor_sentence(outcome: Outcome, factor: Factor, where: Markup) -> Markup:
    if not np.isfinite(factor.gap.value):
        return Markup("<b>{}</b>: the finished points cannot tell it from another factor.").format(factor.name)
    if factor.best == factor.worst or abs(factor.gap.value) < LEAST:
        return Markup("<b>{}</b>: its levels do not differ{}.").format(factor.name, where)
    said = Markup("<b>{}</b>: {} is {} ahead of {}{}, {}.")
    return said.format(factor.name, factor.best, _amount(outcome, factor.gap), factor.worst, where, judged(factor.gap))


def _steps_sentence(outcome: Outcome, factor: Factor, where: Markup) -> Markup:
    steps = [f"{step.level} {_amount(outcome, step, is_signed=True)} ({judged(step)})" for step in factor.steps]
    said = Markup("<b>{}</b>, step by step from {}{}: {}.")
    return said.format(factor.name, factor.steps[0].before, where, ", then ".join(steps))


def _expected(names: Sequence[str], outcome: Outcome) -> list[Markup]:
    """For each two neighbours of the expected order whether the first matters more."""
    found, said = {factor.name: factor for factor in outcome.factors if np.isfinite(factor.gap.value)}, []
    for more, less in pairwise(names):
        if more in found and less in found:
            gap, interval = found[more].gap.value - found[less].gap.value, percentile_interval(found[more].draws - found[less].draws)
            answer = "cannot be told" if not _is_more(found[more], found[less]) else "holds" if gap > 0 else "does not hold"
            said.append(
                Markup("Expected: {} matters more than {}. That <b>{}</b>: {} {} apart {}.").format(
                    more, less, answer, show(gap, is_signed=True), outcome.unit, shown(interval)
                )
            )
    return said


def _interaction_sentence(outcome: Outcome) -> list[Markup]:
    if len(outcome.factors) < 2:
        return []
    if not outcome.interactions:
        return [Markup("Whether factors depend on each other cannot be seen in these points: a full grid with all its points can tell.")]
    largest = outcome.interactions[0]
    meaning = "the factors depend on each other" if largest.is_clear else "noise could explain it"
    said = Markup("Largest interaction: {} has {} beyond the sum of both effects, {}.")
    return [said.format(largest.name, _amount(outcome, largest, is_signed=True), meaning)]


def _starts(ablation: Ablation, outcome: Outcome) -> list[Markup]:
    """What the intervals know of other starts of the training."""
    if ablation.has_seeds:
        return []
    if outcome.freedom:
        said = Markup("One seed only: how far another start could move a point is read from what the effects leave over ({} of freedom).")
        return [said.format(counted(outcome.freedom, "degree"))]
    return [Markup("One seed only: the intervals are over test samples, another start could change more than that.")]
