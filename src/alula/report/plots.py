"""The plots of a comparison: score kept against cost, base forgetting against new skill."""

from collections.abc import Sequence

import numpy as np

from alula.evaluation.bootstrap import Interval, percentile_interval
from alula.report.columns import cost_of, gained
from alula.report.format import show_bytes
from alula.report.pareto import Spot, scatter
from alula.report.sections import colour_of
from alula.report.series import Series

View = dict[str, object]
SCORE = "average score, points ↑ better"


def plot_views(series: Sequence[Series], numbers: dict[str, int]) -> list[View]:
    """Average score against training time and stored bytes; base forgetting against new skill.

    Args:
        series: finished ones.
        numbers: of each series in the legend, from 1.
    """
    seconds = {one.name: cost_of(one, "seconds", is_total=True) for one in series}
    unit, each = ("minutes", 60) if max(seconds.values(), default=0.0) >= 180 else ("seconds", 1)
    by_time = [_against(one, numbers, seconds[one.name] / each) for one in series]
    by_size = [_against(one, numbers, cost_of(one, "stored_bytes")) for one in series]
    drawn = {
        "Score kept against training time": scatter(
            _finite(by_time), x_label=f"← better, {unit} in all", y_label=SCORE, x_unit=_plain, y_unit=_plain,
            description="average score against training time",
        ),
        "Score kept against what is stored": scatter(
            _finite(by_size), x_label="← better, stored beside the base model", y_label=SCORE, x_unit=show_bytes, y_unit=_plain,
            description="average score against stored bytes",
        ),
        "Base forgetting against new skill": scatter(
            _finite([_against_skill(one, numbers) for one in series]), x_label="new skill, points → better",
            y_label="base forgetting, points ↓ better", x_unit=_plain, y_unit=_plain,
            description="base forgetting against new skill", is_lower_x_better=False, is_lower_y_better=True, is_cost=False,
        ),
    }  # fmt: skip
    return [{"title": title, "svg": svg} for title, svg in drawn.items() if svg]


def _against(series: Series, numbers: dict[str, int], cost: float) -> Spot:
    return _spot(series, numbers, cost, series.spread("average_score").mean, y_interval=series.interval("average_score"))


def _against_skill(series: Series, numbers: dict[str, int]) -> Spot:
    skill = 100 * float(np.mean([gained(member, member.matrix.rows) for member in series.members]))
    interval = percentile_interval(np.mean([gained(member, member.resampled_rows) for member in series.members], axis=0))
    lost, known = series.spread("base_forgetting").mean, series.interval("base_forgetting")
    return _spot(series, numbers, skill, lost, x_interval=_points(interval), y_interval=known)


def _spot(
    series: Series, numbers: dict[str, int], x: float, y: float, *, x_interval: Interval | None = None, y_interval: Interval | None = None
) -> Spot:
    number = numbers[series.name]
    return Spot(
        label=series.name,
        number=number,
        colour=colour_of(number - 1),
        x=x,
        y=100 * y,
        x_interval=x_interval,
        y_interval=_points(y_interval),
        is_reference=series.is_reference,
    )


def _points(interval: Interval | None) -> Interval | None:
    return interval and Interval(low=100 * interval.low, high=100 * interval.high, level=interval.level)


def _plain(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _finite(spots: Sequence[Spot]) -> list[Spot]:
    return [spot for spot in spots if np.isfinite(spot.x) and np.isfinite(spot.y)]
