"""MoME's two mixtures in the report: the importance of encoders and the choice of adapters, task by task. It imports no torch."""

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from alula.report.figures import NUM_COLOURS
from alula.report.format import show
from alula.report.reading import Cell, Row, rows_by_method
from alula.report.routing import layer_groups

View = dict[str, object]
FILE = "shares.json"
AXES = {"encoders": ("tasks", "encoders"), "adapters": ("tasks", "layers", "experts")}
"""The parts of the file, and what the axes of their numbers are."""
NUMBERS = {"encoders": ("importance", "weights"), "adapters": ("weights",)}


def share_view(cells: Sequence[Cell], *, groups: Mapping[str, Sequence[str]] | None = None) -> View:
    """Of every method with such a file the means over its cells with the same tasks, encoders and adapters.

    Args:
        groups: of each group of tasks their names: means over these are shown, not the tasks. None: each task is.
    """
    problems: list[str] = []
    wanted = "one number for each of tasks and encoders, or tasks, layers and experts, is wanted."
    found = rows_by_method(cells, FILE, is_usable=_is_usable, wanted=wanted, problems=problems)
    shown = [{"name": name, **_group(rows, groups or {})} for name, rows in found.items()]
    return {"groups": shown, "problems": problems}


def _is_usable(row: Row) -> bool:
    own = [kind for kind in AXES if kind in row]
    return bool(own) and all(_fits(kind, row[kind]) for kind in own)


def _fits(kind: str, part: object) -> bool:
    if not isinstance(part, dict) or not all(isinstance(part.get(key), list) for key in (*AXES[kind], *NUMBERS[kind])):
        return False
    wanted = tuple(len(part[axis]) for axis in AXES[kind])
    try:
        return all(np.array(part[key], dtype=float).shape == wanted for key in NUMBERS[kind])
    except (TypeError, ValueError):
        return False


def _group(rows: Sequence[Row], groups: Mapping[str, Sequence[str]]) -> View:
    makers = (("encoders", _encoders), ("adapters", _adapters))
    return {kind: make([_by_group(kind, part, groups) for part in _alike(kind, rows)]) for kind, make in makers}


def _by_group(kind: str, part: Row, groups: Mapping[str, Sequence[str]]) -> Row:
    """The part with groups in the place of its tasks; as it is where none of its tasks is in one."""
    places = {name: [part["tasks"].index(task) for task in tasks if task in part["tasks"]] for name, tasks in groups.items()}
    places = {name: own for name, own in places.items() if own}
    if not places:
        return part
    means = {key: [np.mean([part[key][place] for place in own], axis=0) for own in places.values()] for key in NUMBERS[kind]}
    return {**part, "tasks": list(places), **means}


def _alike(kind: str, rows: Sequence[Row]) -> list[Row]:
    """That part of those cells that have the axes of the first one with it."""
    parts = [row[kind] for row in rows if kind in row and row[kind]["tasks"]]
    return [part for part in parts if all(part[axis] == parts[0][axis] for axis in AXES[kind])]


def _mean(parts: Sequence[Row], key: str) -> np.ndarray:
    return np.mean([part[key] for part in parts], axis=0)


def _encoders(parts: Sequence[Row]) -> View | None:
    """A bar for each task, and the numbers."""
    if not parts:
        return None
    names, importance, weights = parts[0]["encoders"], _mean(parts, "importance"), _mean(parts, "weights")
    return {
        "heads": _heads(names),
        "num_cells": len(parts),
        "lines": [
            {"task": task, "bar": _bar(names, shares), "cells": _cells(shares), "weights": [show(float(value), digits=2) for value in own]}
            for task, shares, own in zip(parts[0]["tasks"], importance, weights, strict=True)
        ],
    }


def _adapters(parts: Sequence[Row]) -> View | None:
    """A heat map for each third of the depth."""
    if not parts:
        return None
    weights, tasks = _mean(parts, "weights"), parts[0]["tasks"]
    groups = [
        {"label": label, "lines": [{"task": task, "cells": _cells(weights[i][chosen].mean(0))} for i, task in enumerate(tasks)]}
        for label, chosen in layer_groups(parts[0]["layers"])
    ]
    return {"heads": _heads(parts[0]["experts"]), "num_cells": len(parts), "groups": groups}


def _heads(names: Sequence[str]) -> list[View]:
    return [{"name": name, "colour": _colour(place)} for place, name in enumerate(names)]


def _cells(shares: np.ndarray) -> list[View]:
    return [{"shade": round(100 * float(share)), "text": show(100 * float(share), digits=0)} for share in shares]


def _bar(names: Sequence[str], shares: np.ndarray) -> Markup:
    """The shares side by side, as wide as the table's cell."""
    parts, start = [Markup('<svg width="100%" height="16" role="img">')], 0.0
    piece = Markup('<rect class="c{}" style="fill:var(--colour)" x="{:.2f}%" width="{:.2f}%" height="16"><title>{} {:.0%}</title></rect>')
    for place, (name, share) in enumerate(zip(names, shares.tolist(), strict=True)):
        parts.append(piece.format(_colour(place), 100 * start, 100 * share, name, share))
        start += share
    return Markup("").join([*parts, Markup("</svg>")])


def _colour(place: int) -> int:
    return place % NUM_COLOURS + 1
