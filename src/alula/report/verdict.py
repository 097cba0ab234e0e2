"""What may be said of a run, in sentences: nothing is called better that its noise could explain."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from markupsafe import Markup

from alula.evaluation.bootstrap import Interval, percentile_interval
from alula.evaluation.measures import MEASURES
from alula.report.format import show, show_interval
from alula.report.series import Series, on_shared_cells

MOST = 4
"""Names in a row that still read as a sentence."""


def difference(first: Series, second: Series, metric: str = "average_score") -> tuple[float, Interval | None]:
    """first - second over the cells that both have, and its paired interval where both have predictions of the same tasks."""
    first, second = on_shared_cells(first, second)
    gap = first.spread(metric).mean - second.spread(metric).mean
    draws = first.resampled(metric), second.resampled(metric)
    is_paired = len(draws[0]) == len(draws[1]) > 0 and _tasks(first) == _tasks(second)
    return gap, percentile_interval(draws[0] - draws[1]) if is_paired else None


def _tasks(series: Series) -> set[str]:
    return set(series.members[0].matrix.tasks) if series.members else set()


def seed_noise(series: Sequence[Series], metric: str = "average_score") -> float:
    """Twice the standard error of a difference of two means over seeds, from the pooled deviation; 0 for single seeds."""
    spreads = [one.spread(metric) for one in series]
    several = [s for s in spreads if s.count > 1 and np.isfinite(s.sd)]
    if not several:
        return 0.0
    pooled = np.sqrt(np.mean([s.sd**2 for s in several]))
    return float(2 * pooled * np.sqrt(2 / np.mean([s.count for s in several])))


def noise_level(series: Sequence[Series]) -> float | None:
    """The difference of average scores below which nothing can be said: the larger of sample noise and seed noise."""
    intervals = [difference(a, b)[1] for a, b in combinations(series, 2)]
    widths = [interval.half_width for interval in intervals if interval is not None]
    return max(float(np.median(widths)), seed_noise(series)) if widths else None


def listed(names: Sequence[str]) -> str:
    """``a, b, c`` and how many more."""
    more = len(names) - MOST
    return ", ".join(names) if more < 2 else f"{', '.join(names[:MOST])} and {more} more"


def write_verdict(series: Sequence[Series], *, failed: Sequence[str], waiting: Sequence[str]) -> list[Markup]:
    """The sentences, the most important first."""
    finished = [one for one in series if one.members and not one.is_partial]
    whole = [one for one in finished if np.isfinite(one.spread("average_score").mean)]
    ours = best_first([one for one in whole if not one.is_reference])
    sentences: list[Markup] = []
    if ours:
        seeds = seed_noise(whole)
        sentences += [_best(ours, seeds), *_noise(noise_level(whole), seeds, several=any(len(one.orders) > 1 for one in whole))]
        sentences += [*_against(ours, seeds), *_kept(ours[0]), *_keepers(ours), *_references(ours[0], whole, seeds)]
    elif finished:
        sentences.append(Markup("Every task is scored in bits, of which there is no average score: the score matrix has them."))
    else:
        sentences.append(Markup("No method has finished the stream yet: the numbers below are of stages on the way."))
    if failed:
        sentences.append(Markup("<b>Crashed</b>, and not in any mean: {}.").format(listed(failed)))
    if waiting:
        sentences.append(Markup("Not finished, and not in any mean where another seed has: {}.").format(listed(waiting)))
    return sentences


def best_first(series: Sequence[Series], metric: str = "average_score") -> list[Series]:
    """By a measure in the orders that all of them learnt; in all they have, where they share none."""
    shared = set.intersection(*(set(one.orders) for one in series)) if series else set()

    def mean(one: Series) -> float:
        members = [member for member in one.members if not shared or member.cell.order in shared]
        return float(np.mean([member.summaries[metric] for member in members]))

    return sorted(series, key=mean, reverse=MEASURES[metric].higher_is_better)


def _points(gap: float, interval: Interval | None, *, is_signed: bool = True) -> str:
    return f"{show(100 * gap, is_signed=is_signed)} points {show_interval(interval)}".strip()


def _is_noise(gap: float, interval: Interval | None, seeds: float) -> bool:
    """True where other test samples (the paired interval) or other seeds could explain the difference."""
    return interval is None or not interval.excludes(0.0) or abs(gap) < seeds


def _best(ours: Sequence[Series], seeds: float) -> Markup:
    best, over = ours[0], ours[0].spread("average_score")
    count = best.counted if over.count > 1 else "one seed"
    is_highest = over.mean >= max(one.spread("average_score").mean for one in ours)
    how, where = " at once" if best.is_joint else "", "" if is_highest else " in the orders that all of them learnt"
    said = Markup("After {} tasks{} <b>{}</b> has the highest average score of the methods{}: <b>{}</b> ({}, n = {}).").format(
        best.members[0].matrix.num_learnt, how, best.name, where,
        _points(over.mean, best.interval("average_score"), is_signed=False), count, best.num_samples("average_score"),
    )  # fmt: skip
    gaps = [(f"{other.name} ({_points(*gap)})", *gap) for other in ours[1:] for gap in [difference(other, best)]]
    close = [name for name, gap, interval in gaps if _is_noise(gap, interval, seeds)]
    ahead = [name for name, gap, interval in gaps if gap > 0 and name not in close]  # only by other orders than those all learnt
    said += Markup(" It cannot be told apart from {}.").format(listed(close)) if close else ""
    return said + Markup(" In all cells that both have it is behind {}.").format(listed(ahead)) if ahead else said


def _against(ours: Sequence[Series], seeds: float) -> list[Markup]:
    plain = next((one for one in ours[1:] if one.method == "finetune"), None)
    if plain is None:
        return []
    gap, interval = difference(ours[0], plain)
    judged = "noise could explain it" if _is_noise(gap, interval, seeds) else "more than noise"
    return [Markup("Against plain fine-tuning (<b>{}</b>) that is {}: {}.").format(plain.name, _points(gap, interval), judged)]


def _kept(best: Series) -> list[Markup]:
    said = []
    change, interval = best.spread("backward_transfer").mean, best.interval("backward_transfer")
    if np.isfinite(change):
        judged = _judge(change, interval, "nothing measurable was forgotten", "earlier tasks got better", "earlier tasks got worse")
        said.append(Markup("Its backward transfer is {}: {}.").format(_points(change, interval), judged))
    lost, interval = best.spread("base_forgetting").mean, best.interval("base_forgetting")
    if np.isfinite(lost):
        judged = _judge(-lost, _flip(interval), "no loss can be measured", "it gained", "it lost")
        said.append(Markup("On what the base model could do before, {} ({}).").format(judged, _points(-lost, _flip(interval))))
    bits, interval = best.spread("base_bits_increase").mean, best.interval("base_bits_increase")
    if np.isfinite(bits):
        judged = _judge(-bits, _flip(interval), "costs as many bits as before", "costs fewer bits", "costs more bits")
        shown = show(bits, digits=3, is_signed=True), show_interval(interval, scale=1.0, digits=3)
        said.append(Markup("Prose {} ({} bits a byte {}).").format(judged, *shown))
    return [Markup(" ").join(said)] if said else []


def _keepers(ours: Sequence[Series]) -> list[Markup]:
    """After which of several methods base tasks and prose stand best, and which lost something of them."""
    found = [
        _keeper(ours, metric, what) for metric, what in (("base_forgetting", "Base tasks stand"), ("base_bits_increase", "Prose stands"))
    ]
    return [sentence for sentence in found if sentence]


def _keeper(ours: Sequence[Series], metric: str, what: str) -> Markup:
    """What the paired intervals tell of `metric`, of which lower is better; empty for fewer than two methods."""
    known = best_first([one for one in ours if np.isfinite(one.spread(metric).mean)], metric)
    if len(known) < 2:
        return Markup("")
    best, *others = known
    seeds = seed_noise(known, metric)
    gaps = [(other.name, *difference(other, best, metric)) for other in others]
    behind = [name for name, gap, interval in gaps if gap > 0 and not _is_noise(gap, interval, seeds)]
    changes = {one.name: _change(metric, one.spread(metric).mean, one.interval(metric)) for one in known}
    said = Markup("{} best after <b>{}</b> ({} against the base model, n = {}), {}.").format(
        what, best.name, changes[best.name], best.num_samples(metric),
        f"better by more than noise than after {listed(behind[::-1])}" if behind else "but after no other method clearly worse",
    )  # fmt: skip
    losses = [(one.name, one.spread(metric).mean, one.interval(metric)) for one in reversed(known)]
    lost = [f"{name} ({changes[name]})" for name, loss, interval in losses if loss > 0 and interval and interval.excludes(0.0)]
    return said + Markup(" Clearly lost by {}.").format(listed(lost) or "none")


def _change(metric: str, lost: float, interval: Interval | None) -> str:
    """What a loss changes: ``−1.2 points [−2.0, −0.4]``, or bits a byte, of which more is worse."""
    if metric == "base_bits_increase":
        return f"{show(lost, digits=3, is_signed=True)} bits a byte {show_interval(interval, scale=1.0, digits=3)}".strip()
    return _points(-lost, _flip(interval))


def _flip(interval: Interval | None) -> Interval | None:
    return interval and Interval(low=-interval.high, high=-interval.low, level=interval.level)


def _judge(gain: float, interval: Interval | None, same: str, better: str, worse: str) -> str:
    if interval is None or not interval.excludes(0.0):
        return same
    return better if gain > 0 else worse


def _references(best: Series, whole: Sequence[Series], seeds: float) -> list[Markup]:
    said = []
    for reference in (one for one in whole if one.is_reference):
        gap, interval = difference(reference, best)
        what = "all tasks at once" if reference.is_joint else "told which task it is"
        judged = "noise could explain it" if _is_noise(gap, interval, seeds) else "more than noise"
        said.append(Markup("The reference <b>{}</b> ({}) is {} away: {}.").format(reference.name, what, _points(gap, interval), judged))
    return [Markup(" ").join(said)] if said else []


def _noise(noise: float | None, seeds: float, *, several: bool) -> list[Markup]:
    if noise is None:
        return []
    reason = ("seeds and orders" if several else "seeds") if seeds == noise else "test samples, for a typical pair of series"
    single = "" if seeds else " One seed only: another start could change more than that."
    said = Markup("<b>Differences under {} points are noise here</b> (from the {}, 95 %).{}")
    return [said.format(show(100 * noise), reason, single)]
