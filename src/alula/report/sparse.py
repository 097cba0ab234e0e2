"""How the experts of sparse feed-forward networks share the tokens, layer by layer and task by task. It imports no torch."""

import re
from collections.abc import Sequence

import numpy as np

from alula.report.format import show
from alula.report.reading import Cell, Row, rows_by_method

View = dict[str, object]
FILE = "sparse.json"
NUMBERS = ("load", "confidence", "dropped")
MOST_EXPERTS = 16
"""With more of them only the busiest and the idlest are shown."""


def sparse_view(cells: Sequence[Cell]) -> View:
    """Of every method with sparse networks the means over its cells with the same tasks, layers and experts."""
    problems: list[str] = []
    wanted = "shares of tasks x layers x experts are wanted."
    found = rows_by_method(cells, FILE, is_usable=_is_usable, wanted=wanted, problems=problems)
    return {"groups": [_group(name, rows) for name, rows in found.items()], "problems": problems}


def _is_usable(row: Row) -> bool:
    if not all(isinstance(row.get(key), list) and row[key] for key in ("tasks", "layers")):
        return False
    shape = (len(row["tasks"]), len(row["layers"]))
    try:
        shapes = {key: np.array(row.get(key), dtype=float).shape for key in NUMBERS}
    except (TypeError, ValueError):
        return False
    return shapes["confidence"] == shapes["dropped"] == shape and shapes["load"] == (*shape, row.get("experts"))


def _group(name: str, rows: Sequence[Row]) -> View:
    alike = [row for row in rows if all(row[key] == rows[0][key] for key in ("tasks", "layers", "experts"))]
    means = [np.mean([row[key] for row in alike], axis=0) for key in NUMBERS]
    number = rows[0]["experts"]
    return {
        "name": name,
        "num_cells": len(alike),
        "about": f"{number} experts, {rows[0].get('top_k')} for each token",
        "heads": [str(expert + 1) for expert in range(number)] if number <= MOST_EXPERTS else [],
        "parts": [
            {"label": "layer", "lines": _lines([_layer(path) for path in rows[0]["layers"]], *(one.mean(0) for one in means))},
            {"label": "task", "lines": _lines(rows[0]["tasks"], *(one.mean(1) for one in means))},
        ],
    }


def _lines(names: Sequence[str], load: np.ndarray, confidence: np.ndarray, dropped: np.ndarray) -> list[View]:
    """One line for each layer or task: the share of every expert, and what they come to."""
    number = load.shape[-1]
    return [
        {
            "name": name,
            "cells": [_cell(float(share), number) for share in shares] if number <= MOST_EXPERTS else [],
            "busiest": show(number * float(shares.max()), digits=2),
            "idlest": show(number * float(shares.min()), digits=2),
            "confidence": show(100 * float(sure), digits=0),
            "dropped": show(100 * float(lost), digits=1),
        }
        for name, shares, sure, lost in zip(names, load, confidence, dropped, strict=True)
    ]


def _cell(share: float, number: int) -> View:
    """In percent; an even share has half the shade, twice that or more the whole."""
    return {"shade": round(min(50 * share * number, 100)), "text": show(100 * share, digits=0)}


def _layer(path: str) -> str:
    found = re.search(r"\d+", path)
    return found.group() if found else path
