"""What may be said of an ablation, in sentences: nothing matters more than another thing that its noise could explain."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from alula.evaluation.bootstrap import percentile_interval
from alula.report.format import show
from alula.report.outcomes import Ablation, Factor, Outcome, shown
from alula.report.verdict import listed


def write_findings(ablation: Ablation, outcomes: Sequence[Outcome]) -> list[Markup]:
    """What may be said, in sentences, the most important first; of the first outcome."""
    if not outcomes or not outcomes[0].factors:
        return [Markup("Fewer than two points have a finished cell: no effect is known yet.")]
    main = outcomes[0]
    said = [_most(main), *(_factor_sentence(main, factor) for factor in main.factors)]
    said += _expected(ablation.about["expected"], main)
    said += _interaction_sentence(ablation, main)
    if ablation.seeds < 2:
        said.append(Markup("One seed only: the intervals are over test samples, another start could change more than that."))
    crashed = [cell.name for point in ablation.points for cell in point.cells if cell.state == "crashed"]
    missing = [point.label for point in ablation.points if not point.members]
    return [
        *said,
        *([Markup("<b>Crashed</b>, and in no effect: {}.").format(listed(crashed))] if crashed else []),
        *([Markup("Without a finished cell, and in no effect: {}.").format(listed(missing))] if missing else []),
    ]


def _most(outcome: Outcome) -> Markup:
    """Which factor matters most, and which it cannot be told apart from."""
    first, *others = outcome.factors
    if not any(factor.is_clear for factor in outcome.factors):
        return Markup("No factor makes a difference to the {} that is more than noise.").format(outcome.name)
    said = Markup("The {} depends most on <b>{}</b>.").format(outcome.name, first.name)
    close = [other.name for other in others if np.isfinite(other.range) and not _is_more(first, other)]
    return said + Markup(" It cannot be told apart from {} in that.").format(listed(close)) if close else said


def _is_more(first: Factor, second: Factor) -> bool:
    interval = percentile_interval(first.draws - second.draws)
    return interval is not None and interval.excludes(0.0)


def _factor_sentence(outcome: Outcome, factor: Factor) -> Markup:
    if not np.isfinite(factor.range):
        return Markup("<b>{}</b>: the finished points cannot tell it from another factor.").format(factor.name)
    gap = f"{show(factor.range)} {outcome.unit} {shown(factor.interval)}".strip()
    judged = "more than noise" if factor.is_clear else "noise could explain it"
    if factor.best == factor.worst:
        return Markup("<b>{}</b>: its levels do not differ.").format(factor.name)
    return Markup("<b>{}</b>: {} is {} ahead of {}, {}.").format(factor.name, factor.best, gap, factor.worst, judged)


def _expected(names: Sequence[str], outcome: Outcome) -> list[Markup]:
    """For each two neighbours of the expected order whether the first matters more."""
    found, said = {factor.name: factor for factor in outcome.factors if np.isfinite(factor.range)}, []
    for more, less in pairwise(names):
        if more in found and less in found:
            gap, interval = found[more].range - found[less].range, percentile_interval(found[more].draws - found[less].draws)
            judged = "cannot be told" if not _is_more(found[more], found[less]) else "holds" if gap > 0 else "does not hold"
            said.append(
                Markup("Expected: {} matters more than {}. That <b>{}</b>: {} {} apart {}.").format(
                    more, less, judged, show(gap, is_signed=True), outcome.unit, shown(interval)
                )
            )
    return said


def _interaction_sentence(ablation: Ablation, outcome: Outcome) -> list[Markup]:
    if not outcome.interactions:
        return [Markup("Whether factors depend on each other cannot be seen in these points: a full grid with all its points can tell.")]
    largest = outcome.interactions[0]
    gap = f"{show(largest.value, is_signed=True)} {outcome.unit} {shown(largest.interval)}".strip()
    judged = "a hint that the factors depend on each other" if largest.is_clear else "noise could explain it"
    return [Markup("Largest interaction: {} has {} beyond the sum of both effects, {}.").format(largest.name, gap, judged)]
