"""Which series can be told apart, by how much, and in how many seeds and orders the difference comes back."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from markupsafe import Markup

from alula.evaluation.bootstrap import Interval, percentile_interval
from alula.report.format import show, show_interval
from alula.report.series import Series
from alula.report.verdict import difference, listed, seed_noise

View = dict[str, object]
METRIC = "average_score"
MANY = 10  # pairs, from which on chance alone makes one look clear every other time


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """Two series; `first` has the higher average score.

    Attributes:
        gap: first minus second, 0 to 1.
        interval: of the paired difference over test samples; None where the samples differ.
        is_noise: other test samples, or other seeds, could explain it.
        num_cells: cells of both with the same seed and order.
        num_same: of these, those in which `first` is ahead too.
        num_clear: of these, those whose own paired interval leaves out zero.
    """

    first: Series
    second: Series
    gap: float
    interval: Interval | None
    is_noise: bool
    num_cells: int
    num_same: int
    num_clear: int

    @property
    def is_reproduced(self) -> bool:
        """Whether there are several cells, and `first` is ahead in all of them."""
        return self.num_cells > 1 and self.num_same == self.num_cells

    @property
    def counted(self) -> str:
        """``4 of 6``: cells in which `first` is ahead."""
        return f"{self.num_same} of {self.num_cells}"


def pairs_of(series: Sequence[Series]) -> list[Pair]:
    """Every pair, the better one first; `series` are finished."""
    ranked = sorted(series, key=lambda one: -one.spread(METRIC).mean)
    noise = seed_noise(ranked)
    return [_pair(first, second, noise) for first, second in combinations(ranked, 2)]


def _pair(first: Series, second: Series, noise: float) -> Pair:
    gap, interval = difference(first, second)
    if gap < 0:  # the ranking is over all cells, the difference over those that both have
        first, second, (gap, interval) = second, first, difference(second, first)
    others = {(member.cell.seed, member.cell.order): member for member in second.members}
    both = [(m, others[m.cell.seed, m.cell.order]) for m in first.members if (m.cell.seed, m.cell.order) in others]
    ahead = [(a, b) for a, b in both if a.summaries[METRIC] > b.summaries[METRIC]]
    draws = [(a.resampled[METRIC], b.resampled[METRIC]) for a, b in ahead]
    own = [percentile_interval(a - b) for a, b in draws if len(a) == len(b) > 0]
    return Pair(
        first=first,
        second=second,
        gap=gap,
        interval=interval,
        is_noise=interval is None or not interval.excludes(0.0) or abs(gap) < noise,
        num_cells=len(both),
        num_same=len(ahead),
        num_clear=sum(one is not None and one.excludes(0.0) for one in own),
    )


def pair_sentences(pairs: Sequence[Pair]) -> list[Markup]:
    """What may be said of all pairs together: what can be told apart, and what comes back in every seed and order."""
    if not pairs:
        return []
    clear = [pair for pair in pairs if not pair.is_noise]
    said = Markup("Of {} pair{} of series {} can be told apart.").format(len(pairs), "s" if len(pairs) > 1 else "", len(clear) or "none")
    if max(pair.num_cells for pair in pairs) < 2:
        return [said + Markup(" <b>Nothing is reproduced here:</b> no two series share more than one seed and order.")]
    if not clear:
        return [said]
    held, broken = (sum(pair.is_reproduced for pair in clear), [pair for pair in clear if not pair.is_reproduced])
    said += Markup(" <b>Reproduced:</b> {} of these {} differences have the same sign in every seed and order.").format(held, len(clear))
    names = [f"{pair.first.name} over {pair.second.name} ({pair.counted})" for pair in broken]
    return [said + Markup(" Not: {}.").format(listed(names)) if names else said]


def pair_view(series: Sequence[Series], pairs: Sequence[Pair]) -> View:
    """A table of differences, row minus column; what noise could explain is grey."""
    names = [one.name for one in sorted(series, key=lambda one: -one.spread(METRIC).mean)]
    found = {(pair.first.name, pair.second.name): pair for pair in pairs}
    lines = []
    for row in names:
        cells = [_cell(found.get((row, column)), found.get((column, row))) for column in names]
        lines.append({"name": row, "cells": cells})
    return {"heads": names, "lines": lines if pairs else [], "by_chance": show(len(pairs) / 20) if len(pairs) >= MANY else ""}


def _cell(ahead: Pair | None, behind: Pair | None) -> View:
    pair, sign = (ahead, 1) if ahead else (behind, -1)
    if pair is None:
        return {"text": "", "kind": "empty"}
    interval = pair.interval
    if interval and sign < 0:
        interval = Interval(low=-interval.high, high=-interval.low, level=interval.level)
    where = f"{pair.first.name} is ahead in {pair.counted} cells with the same seed and order, beyond noise in {pair.num_clear}"
    return {
        "text": show(100 * sign * pair.gap, is_signed=True),
        "detail": show_interval(interval) or "not paired",
        "kind": "same" if pair.is_noise else "better" if sign > 0 else "worse",
        "strength": round(min(abs(100 * pair.gap), 100)),
        "title": f"{where}.",
    }
