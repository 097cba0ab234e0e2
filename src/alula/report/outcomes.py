"""What each level of each factor of a grid adds to every outcome, from one level to the next too, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from jaxtyping import Float

from alula.evaluation.bootstrap import Interval
from alula.report.columns import family_of
from alula.report.effects import Additive, Together, draw_starts, freedom_of, hold_together
from alula.report.format import show_interval
from alula.report.grid_folder import Ablation
from alula.report.same_samples import SameSamples

AVERAGE = "average score"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its interval, which holds together with those of its kind (see `hold_together`)."""

    value: float
    interval: Interval | None

    @property
    def is_clear(self) -> bool:
        """More than noise."""
        return self.interval is not None and self.interval.excludes(0.0)


@dataclass(frozen=True, kw_only=True)
class Effect(Estimate):
    """What one level adds, in units of the outcome; `num_cells` finished cells have that level, `mean` is theirs by points."""

    level: str
    mean: float
    num_cells: int


@dataclass(frozen=True, kw_only=True)
class Step(Estimate):
    """What a level has beyond the one before it."""

    before: str
    level: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """A factor's effects, and the difference of its best and its worst level with the draws of that.

    Attributes:
        steps: from each level to the next; empty where the grid does not say that the levels have an order.
    """

    name: str
    effects: tuple[Effect, ...]
    steps: tuple[Step, ...]
    best: str
    worst: str
    gap: Estimate
    draws: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Interaction(Estimate):
    """What two levels together have beyond the sum of their effects; in a half design it may be of other two levels as well."""

    either: tuple[Together, ...]

    @property
    def name(self) -> str:
        """Both levels with their factors."""
        return ", or ".join(" with ".join(f"{factor} {level}" for factor, level in levels) for levels in self.either)


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """The effects on one number; scores are in points, bits in thousandths.

    Attributes:
        is_asked: the grid names it. `is_group`: it is the mean over a group of tasks.
        num_samples: test samples of a cell behind it.
        freedom: degrees of freedom behind what other starts could change; 0: nothing is known of it.
        cells: the number itself, of the cells of each point that has one, by the point's label.
    """

    name: str
    unit: str
    is_higher_better: bool
    is_asked: bool
    is_group: bool
    num_samples: int
    freedom: int
    grand: float
    cells: dict[str, list[float]]
    factors: tuple[Factor, ...]
    interactions: tuple[Interaction, ...]


def outcomes_of(ablation: Ablation) -> list[Outcome]:
    """What the grid names comes first, then its groups of tasks, the average score, families of probe tasks, and each task alone."""
    if len(ablation.whole) < 2:
        return []
    scores, groups = ablation.scores, ablation.groups
    columns = {name: chosen for name, tasks in groups.items() if (chosen := _alike(scores, tasks))}
    if len(scores.learnt) > 1:
        columns[AVERAGE] = [name for name in scores.names if name in scores.learnt]
    families: dict[str, list[str]] = {}
    for name in scores.names:
        if name in scores.probes:
            families.setdefault(family_of(name), []).append(name)
    columns |= {family: chosen for family, names in families.items() if len(chosen := _alike(scores, names)) > 1}
    columns |= {name: [name] for name in scores.names}
    wanted = ablation.asked or ([AVERAGE] if AVERAGE in columns else sorted(scores.learnt))
    asked = [found for name in wanted if (found := _named(name, columns))] or list(columns)[:1]
    families_asked = [family_of(name) for name in asked]
    order = sorted(columns, key=lambda name: (_place(name, asked), name not in groups, _place(family_of(name), families_asked)))
    return [_outcome(ablation, name, columns[name], is_asked=name in asked) for name in order]


def _alike(scores: SameSamples, tasks: Sequence[str]) -> list[str]:
    """Those of `tasks` that can be compared; bits are never averaged with scores of 0 to 1."""
    known = [name for name in tasks if name in scores.names]
    return [name for name in known if name not in scores.bits] or known


def _named(name: str, columns: dict[str, list[str]]) -> str | None:
    """The outcome of that name, or the only one of that family."""
    return name if name in columns else next((one for one in columns if family_of(one) == name), None)


def _place(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else len(names)


def _outcome(ablation: Ablation, name: str, columns: Sequence[str], *, is_asked: bool) -> Outcome:
    scores, points, generator = ablation.scores, ablation.whole, np.random.default_rng(0)
    is_bits = columns[0] in scores.bits
    chosen = [scores.names.index(column) for column in columns]
    scale, sign = (1000.0, -1.0) if is_bits else (100.0, 1.0)
    fit = Additive([point.levels for point in points], ablation.about["factors"])
    in_point = np.eye(len(points))[scores.points].T  # [points, cells]
    mean = in_point / in_point.sum(1, keepdims=True)
    left = np.eye(len(scores.points)) - in_point.T @ mean if ablation.has_seeds else fit.left
    values, drawn = scale * scores.values[:, chosen].mean(1), scale * scores.draws[..., chosen].mean(-1)
    y, draws = mean @ values, mean @ draw_starts(values, drawn, left, generator)
    factors = [_factor(fit, factor, y, draws, in_point.sum(1), sign=sign, is_ordered=factor in ablation.steps) for factor in fit.factors]
    pairs = fit.interactions()
    beyond = np.array(list(pairs.values())) if pairs else np.zeros((0, len(points)))
    held = hold_together(beyond @ y, beyond @ draws) if pairs else []
    together = [Interaction(either=one, value=float(value), interval=own) for one, value, own in zip(pairs, beyond @ y, held, strict=True)]
    return Outcome(
        name=name,
        unit="thousandths of a bit per byte" if is_bits else "points",
        is_higher_better=not is_bits,
        is_asked=is_asked,
        is_group=name in ablation.groups,
        num_samples=sum(scores.counts[column] for column in columns),
        freedom=freedom_of(left),
        grand=float(fit.grand @ y),
        cells={point.label: values[scores.points == place].tolist() for place, point in enumerate(points)},
        factors=tuple(sorted(factors, key=lambda factor: -np.nan_to_num(factor.gap.value, nan=-1.0))),
        interactions=tuple(sorted(together, key=lambda one: -abs(one.value))),
    )


def _factor(
    fit: Additive,
    name: str,
    y: Float[np.ndarray, " points"],
    draws: Float[np.ndarray, "points resamples"],
    num_cells: Float[np.ndarray, " points"],
    *,
    sign: float,
    is_ordered: bool,
) -> Factor:
    levels, given = fit.factors[name], fit.effects(name)
    values, drawn, means = given @ y, given @ draws, fit.means(name) @ y
    counts = [sum(int(count) for point, count in zip(fit.points, num_cells, strict=True) if point[name] == level) for level in levels]
    effects = tuple(
        Effect(level=level, value=float(values[i]), interval=interval, mean=float(means[i]), num_cells=counts[i])
        for i, (level, interval) in enumerate(zip(levels, hold_together(values, drawn), strict=True))
    )
    up = [(after, before) for before, after in pairwise(range(len(levels)))] if is_ordered else []
    steps = tuple(
        Step(before=levels[before], level=levels[after], value=one.value, interval=one.interval)
        for (after, before), one in zip(up, _differences(values, drawn, up), strict=True)
    )
    best, worst = int(np.argmax(sign * values)), int(np.argmin(sign * values))
    pairs = [(a, b) if sign * (values[a] - values[b]) > 0 else (b, a) for a, b in combinations(range(len(levels)), 2)]
    gaps = dict(zip(pairs, _differences(sign * values, sign * drawn, pairs), strict=True))
    return Factor(
        name=name,
        effects=effects,
        steps=steps,
        best=levels[best],
        worst=levels[worst],
        gap=gaps.get((best, worst), Estimate(value=abs(float(values[best] - values[worst])), interval=None)),
        draws=sign * (drawn[best] - drawn[worst]),
    )


def _differences(
    values: Float[np.ndarray, " levels"], draws: Float[np.ndarray, "levels resamples"], pairs: Sequence[tuple[int, int]]
) -> list[Estimate]:
    """Of each pair the first minus the second."""
    if not pairs:
        return []
    first, second = (list(one) for one in zip(*pairs, strict=True))
    gaps, drawn = values[first] - values[second], draws[first] - draws[second]
    return [Estimate(value=float(gap), interval=one) for gap, one in zip(gaps, hold_together(gaps, drawn), strict=True)]


def shown(interval: Interval | None) -> str:
    """An interval that is in the outcome's units already."""
    return show_interval(interval, scale=1.0)
