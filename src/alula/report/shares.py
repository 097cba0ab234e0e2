"""MoME's two mixtures in the report: the importance of encoders and the choice of adapters, task by task. It imports no torch."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from alula.errors import UserError
from alula.files import read_json
from alula.report.figures import NUM_COLOURS
from alula.report.format import show
from alula.report.reading import Cell, Row
from alula.report.routing import layer_groups

View = dict[str, object]
FILE = "shares.json"
AXES = {"encoders": ("tasks", "encoders"), "adapters": ("tasks", "layers", "experts")}
"""The parts of the file, and what the axes of their numbers are."""
NUMBERS = {"encoders": ("importance", "weights"), "adapters": ("weights",)}


def share_view(cells: Sequence[Cell]) -> View:
    """Of every method with such a file the means over its cells with the same tasks, encoders and adapters."""
    problems: list[str] = []
    found: dict[str, list[Row]] = {}
    for cell in cells:
        if row := _row(cell, problems):
            found.setdefault(cell.method, []).append(row)
    groups = [{"name": name, **_group(rows)} for name, rows in found.items()]
    return {"groups": groups, "problems": problems}


def _row(cell: Cell, problems: list[str]) -> Row:
    """What the file holds; a damaged one is named in `problems`."""
    path = cell.folder / FILE
    try:
        value = read_json(path) if path.exists() else {}
    except UserError as error:
        problems.append(f"{cell.name}: {error}")
        return {}
    if not isinstance(value, dict) or not all(_is_usable(kind, value[kind]) for kind in AXES if kind in value):
        problems.append(f"{cell.name}/{FILE}: one number for each of tasks and encoders, or tasks, layers and experts, is wanted.")
        return {}
    return value


def _is_usable(kind: str, part: object) -> bool:
    if not isinstance(part, dict) or not all(isinstance(part.get(key), list) for key in (*AXES[kind], *NUMBERS[kind])):
        return False
    wanted = tuple(len(part[axis]) for axis in AXES[kind])
    try:
        return all(np.array(part[key], dtype=float).shape == wanted for key in NUMBERS[kind])
    except (TypeError, ValueError):
        return False


def _group(rows: Sequence[Row]) -> View:
    return {kind: make(_alike(kind, rows)) for kind, make in (("encoders", _encoders), ("adapters", _adapters))}


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
