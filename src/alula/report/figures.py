"""Figures as inline SVG, without a plotting library. Colours are CSS classes, so that they follow light and dark."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from alula.evaluation.bootstrap import Interval

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 34
NUM_COLOURS = 12
APART = 11  # between the numbers of two lines that end close to each other


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        colour: a number of the palette, 1 to `NUM_COLOURS`.
        points: (x, y) each.
        number: written where the line ends, for a legend with numbers; 0: none.
    """

    label: str
    colour: int
    points: tuple[tuple[float, float], ...]
    is_dashed: bool = False
    number: int = 0


def round_ticks(low: float, high: float, *, count: int = 4) -> list[float]:
    """About `count` round numbers that span low to high."""
    span = max(high - low, 1e-9)
    step = 10.0 ** np.floor(np.log10(span / count))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= count)
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return [float(round(i * step, 10)) for i in np.arange(first, last + 1)]


def line_chart(
    lines: Sequence[Line],
    *,
    x_labels: Sequence[str],
    unit: Callable[[float], str],
    description: str,
    learnt: int | None = None,
    from_zero: bool = True,
) -> Markup:
    """Lines over stages 0, 1, 2 ...; empty where there is nothing to draw.

    Args:
        learnt: the stage that an upright line marks.
        from_zero: the axis begins at zero; False: where the values are, so that small changes show.
    """
    values = [y for line in lines for _, y in line.points]
    if not values:
        return Markup("")
    margin = 0.05 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 1.0
    ticks = round_ticks(min(0.0, *values), max(values)) if from_zero else round_ticks(min(values) - margin, max(values) + margin)
    low, high = ticks[0], max(ticks[-1], ticks[0] + 1e-9)
    last = max(len(x_labels) - 1, 1)
    right = WIDTH - RIGHT - (22 if any(line.number for line in lines) else 0)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (right - LEFT) * x / last
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)

    parts = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title>').format(WIDTH, HEIGHT, description)]
    for tick in ticks:
        _, y = place(0, tick)
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y, right))
        parts.append(Markup('<text class="tick end" x="{}" y="{:.1f}">{}</text>').format(LEFT - 6, y + 4, unit(tick)))
    if learnt is not None:
        mark = Markup('<path class="learnt-here" d="M{:.1f} {}V{}"><title>learnt here</title></path>')
        parts.append(mark.format(place(learnt, low)[0], TOP, HEIGHT - BOTTOM))
    every = max(1, -(-len(x_labels) // 6))
    for x, label in list(enumerate(x_labels))[::every]:
        is_at_edge = x == len(x_labels) - 1 and right == WIDTH - RIGHT
        anchor = " end" if is_at_edge and x else "" if x == 0 else " middle"
        across, _ = place(x, low)
        short = label if len(label) <= 11 else label[:10] + "…"
        parts.append(Markup('<text class="tick{}" x="{:.1f}" y="{}">{}</text>').format(anchor, across, HEIGHT - 12, short))
    for index, line in enumerate(lines):
        hidden_by = sum(other.points == line.points for other in lines[index + 1 :])  # drawn wider, so that it still shows
        parts.append(_draw_line(line, place, unit, width=2 + 3 * min(hidden_by, 3)) if line.points else Markup(""))
    numbered = [line for line in lines if line.number and line.points]
    parts += [_number(line, place(*line.points[-1]), y, right) for line, y in _apart(numbered, place)]
    return Markup("").join([*parts, Markup("</svg>")])


def _apart(lines: Sequence[Line], place: Callable[[float, float], tuple[float, float]]) -> list[tuple[Line, float]]:
    """Where the number of each line stands: at the height of the line's end, moved until none hides another."""
    ranked = sorted(lines, key=lambda line: (place(*line.points[-1])[1], line.number))
    gap = min(APART, (HEIGHT - TOP - BOTTOM) / max(len(ranked) - 1, 1))
    heights = [place(*line.points[-1])[1] for line in ranked]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    for index in reversed(range(len(heights))):
        below = heights[index + 1] - gap if index + 1 < len(heights) else HEIGHT - BOTTOM
        heights[index] = min(heights[index], below)
    return list(zip(ranked, heights, strict=True))


def _number(line: Line, end: tuple[float, float], y: float, right: float) -> Markup:
    """The number of a line beside its end, and a thin line that leads there."""
    return Markup(
        '<g class="series c{}" data-series="{}"><path class="leader" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>'
        '<text class="number" x="{:.1f}" y="{:.1f}">{}<title>{}</title></text></g>'
    ).format(line.colour, line.number, *end, right + 10, y, right + 12, y + 3.5, line.number, line.label)


def _draw_line(line: Line, place: Callable[[float, float], tuple[float, float]], unit: Callable[[float], str], *, width: int) -> Markup:
    spots = [(*place(x, y), y) for x, y in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in spots)
    dashes = " dashed" if line.is_dashed else ""
    drawn = [Markup('<path class="line c{}{}" stroke-width="{}" d="{}"/>').format(line.colour, dashes, width, path)]
    drawn += [
        Markup('<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}: {}</title></circle>').format(
            line.colour, x, y, 2 + width / 2, line.label, unit(value)
        )
        for x, y, value in spots
    ]
    return Markup('<g class="series" data-series="{}">{}</g>').format(line.number, Markup("").join(drawn))


def interval_bar(mean: float, *, interval: Interval | None, seeds: Sequence[float], low: float, high: float, colour: int) -> Markup:
    """A mean with its interval and a dot for each seed on an axis from `low` to `high`; as wide as its table cell."""

    def place(value: float) -> str:
        return f"{100 * (value - low) / max(high - low, 1e-9):.2f}%"

    parts = [Markup('<svg class="bar" width="100%" height="22"><line class="grid" x1="0" x2="100%" y1="11" y2="11"/>')]
    if interval is not None:
        parts.append(
            Markup('<line class="whisker c{}" x1="{}" x2="{}" y1="11" y2="11"/>').format(colour, place(interval.low), place(interval.high))
        )
    parts += [Markup('<circle class="seed c{}" cx="{}" cy="11" r="3"/>').format(colour, place(value)) for value in seeds]
    parts.append(Markup('<line class="mean c{}" x1="{}" x2="{}" y1="3" y2="19"/></svg>').format(colour, place(mean), place(mean)))
    return Markup("").join(parts)


def data_address(path: Path) -> str | None:
    """The picture in `path` as a data address a page can hold; None where it is missing."""
    if not path.is_file():
        return None
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else path.suffix.lower().lstrip(".") or "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def patch_overlay(
    address: str, *, grid: tuple[int, int], weights: Sequence[Sequence[float]], experts: Sequence[str], colours: Sequence[int]
) -> Markup:
    """The picture below its patch grid; a patch has the colour of the expert with most weight, as strong as that weight.

    Args:
        grid: rows and columns of patches.
        weights: of every expert, for each patch, row by row; without one weight a patch the picture stays bare.
        colours: the palette number of each expert.
    """
    down, across = grid
    has_grid = down * across == len(weights) and down > 0
    width, height = (100 * across, 100 * down) if has_grid else (100, 100)
    parts = [
        Markup('<svg class="picture" viewBox="0 0 {} {}" role="img"><title>the picture and who spoke on it</title>').format(width, height),
        Markup('<image href="{}" width="{}" height="{}" preserveAspectRatio="none"/>').format(address, width, height),
    ]
    for index, shares in enumerate(weights if has_grid else ()):
        row, column = divmod(index, across)
        best = max(range(len(shares)), key=shares.__getitem__)
        parts.append(
            Markup(
                '<rect class="patch c{}" x="{}" y="{}" width="96" height="96" fill-opacity="{:.2f}"><title>{} {:.0%}</title></rect>'
            ).format(colours[best], 100 * column + 2, 100 * row + 2, 0.1 + 0.45 * shares[best], experts[best], shares[best])
        )
    return Markup("").join([*parts, Markup("</svg>")])
