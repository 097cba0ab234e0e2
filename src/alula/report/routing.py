"""Who spoke: routing heat maps, the router's diagnosis, and pictures with the expert of every token."""

import re
from collections.abc import Sequence

import numpy as np

from alula.evaluation.scores import normalise
from alula.report.figures import data_address, patch_overlay
from alula.report.format import show, show_interval
from alula.report.reading import Cell, Row
from alula.report.series import Series
from alula.report.verdict import difference

View = dict[str, object]
MOST_EXAMPLES = 6


def expert_colours(names: Sequence[str], known: dict[str, int]) -> list[int]:
    """A palette number for each expert, the same in the whole report; 0, grey, for the base model."""
    for name in names:
        if name not in known:
            known[name] = 0 if name == "base" else len([n for n in known if n != "base"]) % 8 + 1
    return [known[name] for name in names]


def routing_views(series: Sequence[Series], known: dict[str, int]) -> list[View]:
    """Mean weight of each expert on each task, by depth, for every series that has a router."""
    views = []
    for one in series:
        rows = _routing_rows(one)
        if not rows:
            continue
        weights = np.mean([row["weights"] for row in rows], axis=0)
        first = rows[0]
        groups = [
            {"label": label, "lines": [_routing_line(first, i, weights[i][chosen].mean(0)) for i in range(len(first["tasks"]))]}
            for label, chosen in layer_groups(first["layers"])
        ]
        colours = expert_colours(first["experts"], known)
        heads = [{"name": name, "colour": colour} for name, colour in zip(first["experts"], colours, strict=True)]
        views.append({"name": one.name, "heads": heads, "groups": groups, "num_seeds": len(rows)})
    return views


def _routing_rows(series: Series) -> list[Row]:
    """The routing of every cell of a series; cells with other experts, tasks or layers than the first are left out."""
    rows = [row for member in series.members for row in member.cell.routing if row.get("arm") == series.arm]
    usable = [row for row in rows if row.get("weights") and np.array(row["weights"]).ndim == 3]
    keys = ("experts", "tasks", "layers")
    return [row for row in usable if all(row[key] == usable[0][key] for key in keys)]


def _routing_line(row: Row, task: int, shares: np.ndarray) -> View:
    name = row["tasks"][task]
    cells = [
        {"shade": round(100 * float(share)), "text": show(100 * float(share), digits=0), "is_own": expert == name}
        for expert, share in zip(row["experts"], shares, strict=True)
    ]
    return {"task": name, "is_base": name in row.get("false_use", {}), "cells": cells}


def layer_groups(layers: Sequence[object], *, count: int = 3) -> list[tuple[str, list[int]]]:
    """Sites in about `count` groups by depth: a label and the indices of each. The first number of a name is its layer."""
    found = [re.search(r"\d+", str(layer)) for layer in layers]
    depths = [int(match.group()) if match else index for index, match in enumerate(found)]
    groups = []
    for part in np.array_split(np.array(sorted(set(depths))), count):
        if len(part):
            label = f"layers {part[0]}–{part[-1]}" if len(part) > 1 else f"layer {part[0]}"
            groups.append((label, [i for i, depth in enumerate(depths) if part[0] <= depth <= part[-1]]))
    return groups


def diagnosis_rows(series: Sequence[Series]) -> list[View]:
    """How well each router tells tasks apart, and what it costs against being told."""
    rows: list[View] = []
    for one in series:
        routing = [row for member in one.members for row in member.cell.routing if row.get("arm") == one.arm]
        if routing:
            rows.append({"name": one.name, "cells": _diagnosis(one, routing, series)})
    return rows


def _diagnosis(series: Series, routing: list[Row], every: Sequence[Series]) -> list[View]:
    cosines = [_off_diagonal(row["gate_cosines"]) for row in routing if row.get("gate_cosines")]
    oracle = next((one for one in every if one.method == series.method and one.arm == "oracle"), None)
    gap, interval = difference(oracle, series) if oracle is not None and oracle is not series else (float("nan"), None)
    shares, margins, false = (_by_name(routing, key) for key in ("right_expert_share", "top1_margin", "false_use"))
    return [
        _cell(_mean(shares), shares, unit=" %", scale=100, digits=0),
        _cell(_mean(margins), margins, digits=2),
        _cell(float(np.mean([c.mean() for c in cosines])) if cosines else float("nan"), {}, digits=2),
        _cell(float(np.mean([c.max() for c in cosines])) if cosines else float("nan"), {}, digits=2),
        _cell(_mean(false), false, unit=" %", scale=100, digits=0),
        _cell(gap, {}, scale=100, digits=1, detail=show_interval(interval)),
    ]


def _off_diagonal(cosines: list[list[float]]) -> np.ndarray:
    square = np.array(cosines, dtype=float)
    found = square[~np.eye(len(square), dtype=bool)]
    return found if len(found) else np.array([np.nan])


def _by_name(routing: list[Row], key: str) -> dict[str, float]:
    """The mean over cells of each entry of a `{task: value}` field."""
    names = dict.fromkeys(name for row in routing for name in row.get(key) or {})
    return {name: float(np.mean([row[key][name] for row in routing if name in (row.get(key) or {})])) for name in names}


def _mean(values: dict[str, float]) -> float:
    return float(np.mean(list(values.values()))) if values else float("nan")


def _cell(value: float, parts: dict[str, float], *, digits: int, unit: str = "", scale: float = 1, detail: str = "") -> View:
    is_known = np.isfinite(value)
    listed = [f"{name} {show(part * scale, digits=digits)}" for name, part in parts.items()]
    return {
        "text": show(value * scale, digits=digits) + (unit if is_known else ""),
        "detail": detail or ", ".join(listed),
        "sort": value if is_known else -1e9,
    }


def example_views(cells: Sequence[Cell], known: dict[str, int]) -> list[View]:
    """Pictures and questions coloured by expert, from the first cell of each method that stored some."""
    views = []
    seen: set[str] = set()
    for cell in cells:
        if not cell.examples or cell.method in seen:
            continue
        seen.add(cell.method)
        cards = [_example(cell, row, known) for row in cell.examples[:MOST_EXAMPLES]]
        views.append({"name": cell.name, "cards": cards, "shown": len(cards), "stored": len(cell.examples)})
    return views


def _example(cell: Cell, row: Row, known: dict[str, int]) -> View:
    experts = row.get("experts") or []
    colours = expert_colours(experts, known)
    tokens = [token for token in row.get("tokens") or [] if len(token.get("weights") or []) == len(experts) > 0]
    address = data_address(cell.folder / row["image"]) if row.get("image") else None
    patches = [token["weights"] for token in tokens if token["kind"] == "image"]
    grid = tuple(row.get("grid") or (0, 0))
    words = [_word(token, experts, colours) for token in tokens if token["kind"] != "image"]
    right = normalise(str(row.get("reference", "")))
    return {
        "task": row.get("task", ""),
        "question": row.get("question", ""),
        "picture": patch_overlay(address, grid=grid, weights=patches, experts=experts, colours=colours) if address else "",
        "words": {kind: [word for word in words if word["kind"] == kind] for kind in ("question", "answer")},
        "reference": row.get("reference", ""),
        "answers": [
            {"label": label, "text": row.get(label) or "", "is_right": normalise(str(row.get(label) or "")) == right}
            for label in ("before", "after")
        ],
    }


def _word(token: Row, experts: Sequence[str], colours: Sequence[int]) -> View:
    best = max(range(len(experts)), key=token["weights"].__getitem__)
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in zip(experts, token["weights"], strict=True))
    return {
        "text": token["text"].replace("Ġ", " ").replace("▁", " "),
        "kind": token["kind"],
        "colour": colours[best],
        "strength": round(12 + 48 * token["weights"][best]),
        "title": shares,
    }
