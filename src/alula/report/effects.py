"""What each level of a factor adds: least squares over the points of a grid, and how far it could move. numpy only.

One effect for each level, the effects of a factor summing to zero: on a whole full grid that is the mean over the level's points minus
the grand mean; where points are missing, or one factor is changed at a time, it is the only comparison that mixes no factors.
Source: Box, Hunter & Hunter 2005, Statistics for Experimenters, chapter 5 (main effects and interactions).
"""

from collections.abc import Mapping, Sequence
from itertools import combinations, zip_longest

import numpy as np
from jaxtyping import Float

from alula.evaluation.bootstrap import Interval, percentile_interval

Levels = Mapping[str, str]
Together = tuple[tuple[str, str], tuple[str, str]]
"""Two factors, a level of each."""


class Additive:
    """Grand mean plus one effect of each factor, fitted to the points there are. All it gives are matrices over the points.

    Args:
        points: of each factor the level.
        factors: of each factor the levels; those of no point are left out.

    Attributes:
        factors: the factors with two levels or more, and those levels.
        grand: what gives the grand mean: (points,).
        left: what gives what the effects leave over: (points, points).

    Example:
        >>> fit = Additive([{"size": "s"}, {"size": "l"}, {"size": "l"}], {"size": ["s", "l"]})
        >>> fit.effects("size") @ np.array([1.0, 4.0, 6.0])
        array([-2.,  2.])
    """

    def __init__(self, points: Sequence[Levels], factors: Mapping[str, Sequence[str]]) -> None:
        self.points = points
        found = {name: [level for level in levels if any(point[name] == level for point in points)] for name, levels in factors.items()}
        self.factors = {name: levels for name, levels in found.items() if len(levels) > 1}
        blocks = [self._places(name, points) @ _sum_to_zero(len(levels)) for name, levels in self.factors.items()]
        self._design = np.hstack([np.ones((len(points), 1)), *blocks])
        self._inverse = np.linalg.pinv(self._design)
        self.grand = self._known(np.eye(self._design.shape[1])[:1])[0]
        self.left: Float[np.ndarray, "points points"] = np.eye(len(points)) - self._design @ self._inverse

    def effects(self, factor: str) -> Float[np.ndarray, "levels points"]:
        """What gives the effects of a factor's levels; NaN where the points cannot tell them from another factor's."""
        names = list(self.factors)
        before = 1 + sum(len(self.factors[name]) - 1 for name in names[: names.index(factor)])
        count = len(self.factors[factor])
        asked = np.zeros((count, self._design.shape[1]))
        asked[:, before : before + count - 1] = _sum_to_zero(count)
        return self._known(asked)

    def means(self, factor: str) -> Float[np.ndarray, "levels points"]:
        """What gives the mean over the points of each level."""
        places = self._places(factor, self.points).T
        return places / places.sum(1, keepdims=True)

    def interactions(self) -> dict[tuple[Together, ...], Float[np.ndarray, " points"]]:
        """For each two levels of two factors what gives their mean beyond the sum of the effects; empty where nothing is left over.

        Where the points give the same for levels of other factors, as in half designs, both are one entry: nothing tells them apart.
        """
        if np.allclose(self.left, 0):
            return {}
        alike: dict[bytes, dict[tuple[str, str], list[Together]]] = {}
        for one, two in combinations(self.factors, 2):
            for first in self.factors[one]:
                for second in self.factors[two]:
                    given = self._beyond((one, first), (two, second))
                    if given is not None:
                        key = (np.round(given, 9) + 0.0).tobytes()  # minus zero is zero
                        alike.setdefault(key, {}).setdefault((one, two), []).append(((one, first), (two, second)))
        entries = [entry for found in alike.values() for entry in zip_longest(*found.values())]
        told = [tuple(levels for levels in entry if levels is not None) for entry in entries]
        return {entry: given for entry in told if (given := self._beyond(*entry[0])) is not None}

    def _beyond(self, first: tuple[str, str], second: tuple[str, str]) -> Float[np.ndarray, " points"] | None:
        both = [all(point[factor] == level for factor, level in (first, second)) for point in self.points]
        if not any(both) or np.allclose(given := self.left[both].mean(0), 0):
            return None
        return given

    def _places(self, factor: str, points: Sequence[Levels]) -> Float[np.ndarray, "points levels"]:
        return np.array([[float(point[factor] == level) for level in self.factors[factor]] for point in points])

    def _known(self, asked: Float[np.ndarray, "rows coefficients"]) -> Float[np.ndarray, "rows points"]:
        given = asked @ self._inverse
        is_known = np.isclose(given @ self._design, asked).all(1, keepdims=True)
        return np.where(is_known, given, np.nan)


def _sum_to_zero(count: int) -> Float[np.ndarray, "levels coefficients"]:
    """All levels from all but the last, whose effect is minus the sum of theirs."""
    return np.vstack([np.eye(count - 1), -np.ones(count - 1)])


def freedom_of(left: Float[np.ndarray, "cells cells"]) -> int:
    """Degrees of freedom of what a projection leaves over."""
    return round(float(np.trace(left)))


def draw_starts(
    values: Float[np.ndarray, " cells"],
    draws: Float[np.ndarray, "cells resamples"],
    left: Float[np.ndarray, "cells cells"],
    generator: np.random.Generator,
) -> Float[np.ndarray, "cells resamples"]:
    """`draws` of the test samples, moved as other starts of the training would move each cell.

    How far that is, all cells tell together: the mean square s^2 of what is `left` of their values, with f degrees of freedom. In each
    resample its true value is f s^2 / chi^2(f), so that few seeds give wide intervals (Student's t for a difference); what
    the test samples explain of it is in the draws already and is taken off. Without a degree of freedom nothing is known, and added.

    Source: Box, Hunter & Hunter 2005, chapter 4 (pooled variance); Weerahandi 1993, Generalized Confidence Intervals, for the rest.

    Args:
        left: what gives each cell's deviation from the mean of its point, or, with one seed, what the effects leave over.
    """
    freedom = freedom_of(left)
    if not freedom:
        return draws
    total = ((left @ values) ** 2).sum()
    of_samples = ((left @ (draws - values[:, None])) ** 2).sum(0).mean() / freedom
    variance = np.maximum(total / generator.chisquare(freedom, draws.shape[1]) - of_samples, 0)
    return draws + np.sqrt(variance) * generator.standard_normal(draws.shape)


def hold_together(
    values: Float[np.ndarray, " rows"], draws: Float[np.ndarray, "rows resamples"], *, level: float = 0.95
) -> list[Interval | None]:
    """An interval for each number, such that with the probability `level` all of them hold at once; None for all where one is unknown.

    Each has the width of its own percentile interval, times one factor for all: the `level` quantile of the largest deviation.
    So the best of many is not called better by chance.

    Source: Westfall & Young 1993, Resampling-Based Multiple Testing (single-step max T).
    """
    if not (np.isfinite(values).all() and np.isfinite(draws).all()):
        return [None] * len(values)
    half = np.array([_half_width(row, level) for row in draws])
    away = np.abs(draws - values[:, None])
    apart = np.divide(away, half[:, None], out=np.zeros_like(away), where=half[:, None] > 0)
    half = half * float(np.quantile(apart.max(0), level))
    # Rounded: an interval that ends at zero but for the dust of floating point does not leave zero out.
    ends = np.round([values - half, values + half], 9).T
    return [Interval(low=float(low), high=float(high), level=level) for low, high in ends]


def _half_width(draws: Float[np.ndarray, " resamples"], level: float) -> float:
    own = percentile_interval(draws, level=level)
    return own.half_width if own else 0.0
