"""Numbers as people read them: a true minus, a dash for what is not known, units with a space."""

import math

from alula.evaluation.bootstrap import Interval

UNKNOWN = "–"


def show(value: float | None, *, digits: int = 1, is_signed: bool = False) -> str:
    """`value` with `digits` decimals; ``–`` where it is not known."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return ("+" if is_signed and float(text) > 0 else "") + text.replace("-", "−")


def show_interval(interval: Interval | None, *, scale: float = 100.0, digits: int = 1) -> str:
    """``[45.2, 57.3]``; empty where there is none."""
    if interval is None:
        return ""
    return f"[{show(interval.low * scale, digits=digits)}, {show(interval.high * scale, digits=digits)}]"


def show_amount(value: float | None) -> str:
    """A count in thousands or millions: ``2.4 M``."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def show_bytes(value: float | None) -> str:
    """A size in bytes: ``9.8 MB``."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    shown = show_amount(value)
    return f"{shown}B" if " " in shown else f"{shown} B"


def show_time(seconds: float | None) -> str:
    """A duration: ``2 h 05 min``, ``3 min 20 s``, ``41 s``."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
