"""What is kept against what it costs: scatter plots with the front that no series beats on both axes. Inline SVG, no library."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from alula.evaluation.bootstrap import Interval
from alula.report.figures import round_ticks

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 30, 44
RADIUS, DISTANCES = 8.0, (17.0, 26.0, 35.0, 46.0)  # of a dot with a number, and how far from its place it may stand
Box = tuple[float, float, float, float]  # left, top, right, bottom
LOG_FROM = 20.0  # the ratio of largest to smallest value from which an axis is logarithmic


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One series in a scatter plot: where it is, and how far chance could move it.

    Attributes:
        number: what stands on the dot; the legend says whose it is.
        colour: a number of the palette.
        is_reference: drawn hollow, and never on the front.
    """

    label: str
    number: int
    colour: int
    x: float
    y: float
    x_interval: Interval | None = None
    y_interval: Interval | None = None
    is_reference: bool = False


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What a side of a plot spans."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies, from 0 (low) to 1 (high)."""
        low, high, at = (math.log(x) if self.is_log else x for x in (self.low, self.high, value))
        return (at - low) / max(high - low, 1e-9)


def span(values: Iterable[float], *, may_be_log: bool = True) -> Axis:
    """An axis over `values`: logarithmic, if it may be, where they are all above zero and far apart."""
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known), max(known)
    if may_be_log and low > 0 and high / low > LOG_FROM:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [float(f * 10.0**power) for power in powers for f in ((1, 2, 5) if len(powers) < 4 else (1,))]
        first = max(i for i, tick in enumerate(ticks) if tick <= low)
        last = min((i for i, tick in enumerate(ticks) if tick >= high), default=len(ticks) - 1)
        kept = ticks[first : last + 1]
        return Axis(low=kept[0], high=max(kept[-1], high), ticks=tuple(kept), is_log=True)
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    linear = round_ticks(low if low == 0 else low - margin, high + margin)
    return Axis(low=linear[0], high=linear[-1], ticks=tuple(linear))


def front(spots: Sequence[Spot], *, is_lower_x_better: bool, is_lower_y_better: bool) -> list[Spot]:
    """The spots that no other beats on one axis without losing on the other, by x.

    Example:
        >>> spots = [Spot(label=n, number=1, colour=1, x=x, y=y) for n, x, y in (("a", 1, 5), ("b", 2, 9), ("c", 3, 7))]
        >>> [spot.label for spot in front(spots, is_lower_x_better=True, is_lower_y_better=False)]
        ['a', 'b']
    """

    def worth(spot: Spot) -> tuple[float, float]:
        return (-spot.x if is_lower_x_better else spot.x, -spot.y if is_lower_y_better else spot.y)

    def is_beaten(spot: Spot) -> bool:
        x, y = worth(spot)
        return any(a >= x and b >= y and (a, b) != (x, y) for a, b in map(worth, own))

    own = [spot for spot in spots if not spot.is_reference]
    return sorted((spot for spot in own if not is_beaten(spot)), key=lambda spot: (spot.x, spot.y))


def scatter(
    spots: Sequence[Spot],
    *,
    x_label: str,
    y_label: str,
    x_unit: Callable[[float], str],
    y_unit: Callable[[float], str],
    description: str,
    is_lower_x_better: bool = True,
    is_lower_y_better: bool = False,
    is_cost: bool = True,
) -> Markup:
    """Every series as a numbered dot with its intervals, and a line along the front; empty where there is nothing to draw.

    Args:
        is_cost: x is an amount, whose axis may be logarithmic.
    """
    if not spots:
        return Markup("")
    across = span((value for spot in spots for value in (spot.x, *_ends(spot.x_interval))), may_be_log=is_cost)
    up = span((value for spot in spots for value in (spot.y, *_ends(spot.y_interval))), may_be_log=False)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (WIDTH - LEFT - RIGHT) * across.share(x), HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up.share(y)

    best = front(spots, is_lower_x_better=is_lower_x_better, is_lower_y_better=is_lower_y_better)
    parts = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title>').format(WIDTH, HEIGHT, description)]
    parts += _frame(across, up, place, x_label, y_label, x_unit, y_unit)
    if len(best) > 1:
        line = "M" + "L".join("{:.1f} {:.1f}".format(*place(spot.x, spot.y)) for spot in best)
        parts.append(Markup('<path class="front" d="{}"/>').format(line))
    seated = list(zip(spots, seats(spots, place), strict=True))
    parts += [_draw(spot, place, seat) for spot, seat in seated]
    parts += [_number(spot, seat, f"{spot.label}: {x_unit(spot.x)}, {y_unit(spot.y)}") for spot, seat in seated]  # above all dots
    return Markup("").join([*parts, Markup("</svg>")])


def _ends(interval: Interval | None) -> tuple[float, ...]:
    return (interval.low, interval.high) if interval else ()


def _frame(
    across: Axis,
    up: Axis,
    place: Callable[[float, float], tuple[float, float]],
    x_label: str,
    y_label: str,
    x_unit: Callable[[float], str],
    y_unit: Callable[[float], str],
) -> list[Markup]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for tick in up.ticks:
        _, y = place(across.low, tick)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y, WIDTH - RIGHT))
        parts.append(Markup('<text class="tick end" x="{}" y="{:.1f}">{}</text>').format(LEFT - 6, y + 4, y_unit(tick)))
    for tick in across.ticks:
        x, _ = place(tick, up.low)
        parts.append(Markup('<path class="grid" d="M{:.1f} {}v5"/>').format(x, bottom))
        parts.append(Markup('<text class="tick middle" x="{:.1f}" y="{}">{}</text>').format(x, bottom + 16, x_unit(tick)))
    parts.append(Markup('<text class="end axis" x="{}" y="{}">{}</text>').format(WIDTH - RIGHT, HEIGHT - 10, x_label))
    parts.append(Markup('<text class="axis" x="{}" y="{}">{}</text>').format(2, 12, y_label))
    return parts


def _draw(spot: Spot, place: Callable[[float, float], tuple[float, float]], seat: Box) -> Markup:
    """The intervals of a spot and, where its number stands beside it, a dot and a thin line between the two."""
    x, y = place(spot.x, spot.y)
    parts = []
    if spot.y_interval:
        low, high = (place(spot.x, value)[1] for value in _ends(spot.y_interval))
        parts.append(Markup('<path class="chance c{}" d="M{:.1f} {:.1f}V{:.1f}"/>').format(spot.colour, x, low, high))
    if spot.x_interval:
        low, high = (place(value, spot.y)[0] for value in _ends(spot.x_interval))
        parts.append(Markup('<path class="chance c{}" d="M{:.1f} {:.1f}H{:.1f}"/>').format(spot.colour, low, y, high))
    if math.dist(_middle(seat), (x, y)) > 1:
        parts.append(Markup('<path class="leader c{}" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(spot.colour, x, y, *_middle(seat)))
        parts.append(Markup('<circle class="place c{}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(spot.colour, x, y))
    return _group(spot, parts)


def _number(spot: Spot, seat: Box, said: str) -> Markup:
    across, up = _middle(seat)
    kind = " hollow" if spot.is_reference else ""
    circle = Markup('<circle class="spot c{}{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>')
    text = Markup('<text class="number middle" x="{:.1f}" y="{:.1f}">{}</text>').format(across, up + 3.5, spot.number)
    return _group(spot, [circle.format(spot.colour, kind, across, up, RADIUS, said), text])


def _group(spot: Spot, parts: Sequence[Markup]) -> Markup:
    return Markup('<g class="series" data-series="{}">{}</g>').format(spot.number, Markup("").join(parts))


def _middle(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def seats(spots: Sequence[Spot], place: Callable[[float, float], tuple[float, float]]) -> list[Box]:
    """Where the number of each spot stands: on the spot, or at the nearest place where it hides no other number.

    Of places at the same distance the one that hides least of the dots and intervals.
    """
    drawn = [box for spot in spots for box in _boxes(spot, place)]
    taken: list[Box] = []
    for spot in spots:
        taken.append(_seat(place(spot.x, spot.y), taken=taken, drawn=drawn))
    return taken


def _seat(at: tuple[float, float], *, taken: Sequence[Box], drawn: Sequence[Box]) -> Box:
    x, y = at
    turns = [(math.cos(angle), math.sin(angle)) for angle in (math.tau * turn / 16 for turn in range(16))]
    tried = [at, *((x + away * dx, y + away * dy) for away in DISTANCES for dx, dy in turns)]
    boxes = [(a - RADIUS, b - RADIUS, a + RADIUS, b + RADIUS) for a, b in tried]
    inside = [box for box in boxes if box[0] >= LEFT - RADIUS and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM + RADIUS]

    def cost(box: Box) -> tuple[float, int, float]:
        away = math.dist(at, _middle(box))
        return sum(_overlap(box, other) for other in taken), round(away), sum(_overlap(box, other) for other in drawn)

    return min(inside or boxes, key=cost)


def _boxes(spot: Spot, place: Callable[[float, float], tuple[float, float]]) -> list[Box]:
    """What a spot and its intervals cover."""
    x, y = place(spot.x, spot.y)
    across, up = ([place(value, spot.y)[0] for value in _ends(spot.x_interval)], [place(spot.x, v)[1] for v in _ends(spot.y_interval)])
    boxes = [(x - 5.0, y - 5.0, x + 5.0, y + 5.0)]
    boxes += [(across[0], y - 1, across[1], y + 1)] if across else []
    return boxes + ([(x - 1, up[1], x + 1, up[0])] if up else [])


def _overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    return max(0.0, across) * max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
