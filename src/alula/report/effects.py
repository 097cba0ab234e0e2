"""What each level of a factor adds: least squares over the points of a grid, and how far it could move. numpy only.

One effect for each level, the effects of a factor summing to zero: on a whole full grid that is the mean over the level's points minus
the grand mean; where points are missing, or one factor is changed at a time, it is the only comparison that mixes no factors.
Source: Box, Hunter & Hunter 2005, Statistics for Experimenters, chapter 5 (main effects and interactions).
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float

Levels = Mapping[str, str]


class Additive:
    """Grand mean plus one effect of each factor, fitted to the points there are. All it gives are matrices over the points.

    Args:
        points: of each factor the level.
        factors: of each factor the levels; those of no point are left out.

    Attributes:
        factors: the factors with two levels or more, and those levels.
        grand: what gives the grand mean: (points,).

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

    def interactions(self) -> dict[tuple[tuple[str, str], tuple[str, str]], Float[np.ndarray, " points"]]:
        """For each two levels of two factors what gives their mean beyond the sum of the effects; empty where nothing is left over."""
        left = np.eye(len(self.points)) - self._design @ self._inverse
        if np.allclose(left, 0):
            return {}
        found = {}
        for one, two in combinations(self.factors, 2):
            for first in self.factors[one]:
                for second in self.factors[two]:
                    both = [point[one] == first and point[two] == second for point in self.points]
                    if any(both) and not np.allclose(given := left[both].mean(0), 0):
                        found[(one, first), (two, second)] = given
        return found

    def _places(self, factor: str, points: Sequence[Levels]) -> Float[np.ndarray, "points levels"]:
        return np.array([[float(point[factor] == level) for level in self.factors[factor]] for point in points])

    def _known(self, asked: Float[np.ndarray, "rows coefficients"]) -> Float[np.ndarray, "rows points"]:
        given = asked @ self._inverse
        is_known = np.isclose(given @ self._design, asked).all(1, keepdims=True)
        return np.where(is_known, given, np.nan)


def _sum_to_zero(count: int) -> Float[np.ndarray, "levels coefficients"]:
    """All levels from all but the last, whose effect is minus the sum of theirs."""
    return np.vstack([np.eye(count - 1), -np.ones(count - 1)])


def draw_seeds(values: Float[np.ndarray, "seeds resamples"], generator: np.random.Generator) -> Float[np.ndarray, " resamples"]:
    """The mean over seeds that are drawn again in each resample of the test samples; of one seed, its values.

    The deviation from the mean over all seeds is widened by sqrt(n / (n - 1)): n seeds drawn from n vary by (n - 1) / n too little.
    Source: Davison & Hinkley 1997, Bootstrap Methods and their Application, section 2.3.
    """
    count, resamples = values.shape
    mean = values.mean(0)
    if count == 1:
        return mean
    drawn = generator.integers(count, size=(count, resamples))
    return mean + np.sqrt(count / (count - 1)) * (np.take_along_axis(values, drawn, axis=0).mean(0) - mean)
