"""Main effects as one figure: a line for each level of each factor, on one axis."""

import math

from markupsafe import Markup

from alula.report.figures import round_ticks
from alula.report.format import show
from alula.report.outcomes import Effect, Outcome, shown

WIDTH, NAMES, RIGHT, ROW, TOP, BOTTOM = 620, 190, 20, 20, 8, 30


def effects_chart(outcome: Outcome, colours: dict[str, int]) -> Markup:
    """The effects and their 95 % intervals; hollow where noise could explain them. Empty where there are none.

    Args:
        colours: of each factor.
    """
    rows: list[tuple[str, Effect | None]] = []
    for factor in outcome.factors:
        rows += [(factor.name, None), *((factor.name, effect) for effect in factor.effects if math.isfinite(effect.value))]
    ends = [end for _, effect in rows if effect for end in _ends(effect)]
    if not ends:
        return Markup("")
    ticks = round_ticks(min(0.0, *ends), max(0.0, *ends), count=6)
    low, high = ticks[0], max(ticks[-1], ticks[0] + 1e-9)
    foot = TOP + ROW * len(rows)

    def across(value: float) -> float:
        return NAMES + (WIDTH - NAMES - RIGHT) * (value - low) / (high - low)

    title = f"effects on {outcome.name} in {outcome.unit}"
    parts = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title>').format(WIDTH, foot + BOTTOM, title)]
    for tick in ticks:
        kind = "whole" if tick == 0 else "grid"
        parts.append(Markup('<path class="{}" d="M{:.1f} {}V{}"/>').format(kind, across(tick), TOP, foot))
        label = f"{tick:g}".replace("-", "−")
        parts.append(Markup('<text class="tick middle" x="{:.1f}" y="{}">{}</text>').format(across(tick), foot + 16, label))
    for index, (name, effect) in enumerate(rows):
        y = TOP + ROW * (index + 0.5)
        if effect is None:
            parts.append(Markup('<text class="axis" x="4" y="{:.1f}">{}</text>').format(y + 4, _short(name)))
            continue
        text = f"{name} {effect.level}: {show(effect.value, is_signed=True)} {shown(effect.interval)}"
        left, right = (across(end) for end in (min(_ends(effect)), max(_ends(effect))))
        parts += [
            Markup('<g class="c{}"><title>{}</title>').format(colours[name], text),
            Markup('<text class="tick" x="16" y="{:.1f}">{}</text>').format(y + 4, _short(effect.level)),
            Markup('<path class="chance" d="M{:.1f} {:.1f}H{:.1f}"/>').format(left, y, right),
            Markup('<circle class="spot{}" cx="{:.1f}" cy="{:.1f}" r="5"/></g>').format(
                "" if effect.is_clear else " hollow", across(effect.value), y
            ),
        ]
    return Markup("").join([*parts, Markup("</svg>")])


def _ends(effect: Effect) -> tuple[float, ...]:
    return (effect.value,) if effect.interval is None else (effect.interval.low, effect.value, effect.interval.high)


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"
