"""Where attention goes: the share on text before an image, on the image and on text after it, layer by layer, before and
after learning. It reads what the diagnosis wrote and imports no torch.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alula.errors import UserError
from alula.evaluation.bootstrap import Interval, paired_interval
from alula.files import read_json
from alula.report.figures import Line, line_chart
from alula.report.format import UNKNOWN, show, show_interval
from alula.report.page import write_page
from alula.report.reading import Cell, Row

View = dict[str, object]
FILE = "attention_shift.json"
SEGMENTS = (
    ("before", "text before the image", 1),
    ("itself", "the image", 2),
    ("between", "text between images", 4),
    ("after", "text after the image", 3),
)
"""Name in the file, what it is called, number of the palette."""


def attention_view(cells: Sequence[Cell]) -> View:
    """The shifts of every cell that has some, and the curves of the first such cell of each method."""
    problems: list[str] = []
    found = {cell.name: rows for cell in cells if (rows := _rows(cell.folder / FILE, problems))}
    drawn: dict[str, str] = {}
    for cell in cells:
        if cell.name in found:
            drawn.setdefault(cell.method, cell.name)
    return _view(found, drawn=tuple(drawn.values()), problems=problems)


def build_attention_page(rows: Sequence[Row], *, out: Path | str, title: str) -> Path:
    """Writes the shifts and curves of one diagnosis as an HTML page that needs nothing else, and gives its path.

    Raises:
        UserError: `out` cannot be written.
    """
    view = _view({title: list(rows)}, drawn=(title,), problems=[])
    return write_page(Path(out), "attention_page.html.j2", {"title": title, "attention": view})


def shifts_of_cell(cell: Cell, arm: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The shift of each sample at the end and before learning, NaN where it has none; None where the cell does not have both."""
    rows = _rows(cell.folder / FILE, [])
    ends = [row for row in rows if row["row"] > 0 and row.get("arm", "default") == arm]
    base = next((row for row in rows if row["row"] == 0), {})
    if not ends or not base.get("shifts") or base.get("ids") != ends[-1].get("ids"):
        return None
    now, before = (np.array([np.nan if shift is None else shift for shift in row["shifts"]], dtype=float) for row in (ends[-1], base))
    return now, before


def shift_lines(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Each measurement in words: moment, shift, interval, n, change against the first row 0 on the same samples."""
    base = next((row for row in rows if row["row"] == 0), None)
    return [
        {
            "moment": _moment(row),
            "shift": show(row["shift"], digits=3),
            "interval": show_interval(_interval(row), scale=1, digits=3),
            "n": str(row["n"]),
            "left_out": ", ".join(f"{count} {reason}" for reason, count in (row.get("left_out") or {}).items() if count) or "none",
            **_change(base, row),
        }
        for row in rows
    ]


def _view(found: dict[str, list[Row]], *, drawn: Sequence[str], problems: list[str]) -> View:
    used = {name for rows in found.values() for row in rows for name, curve in row["curves"].items() if any(curve)}
    return {
        "legend": [{"name": label, "colour": colour} for name, label, colour in SEGMENTS if name in used],
        "groups": [{"name": name, "charts": [_chart(row) for row in _ends(found[name])]} for name in drawn],
        "lines": [{"name": name, **line} for name, rows in found.items() for line in shift_lines(rows)],
        "problems": problems,
    }


def _rows(path: Path, problems: list[str]) -> list[Row]:
    """What the file holds; a damaged one is named in `problems`."""
    if not path.exists():
        return []
    try:
        value = read_json(path)
    except UserError as error:
        problems.append(f"{path.parent.name}: {error}")
        return []
    rows = [row for row in (value if isinstance(value, list) else [value]) if _is_usable(row)]
    if not rows:
        problems.append(f"{path.parent.name}/{FILE}: 'row', 'layers', 'curves', 'shift' and 'n' are wanted in each entry.")
    return rows


def _is_usable(row: object) -> bool:
    if not isinstance(row, dict) or not {"row", "layers", "curves", "shift", "n"} <= row.keys() or not isinstance(row["curves"], dict):
        return False
    return all(len(curve) == len(row["layers"]) for curve in row["curves"].values())


def _ends(rows: Sequence[Row]) -> list[Row]:
    """The base model, then the last measurement of each arm."""
    last = {row.get("arm", "default"): row for row in sorted(rows, key=lambda row: row["row"]) if row["row"] > 0}
    return [*[row for row in rows if row["row"] == 0][:1], *last.values()]


def _moment(row: Row) -> str:
    """A name of its own, or what the row and the arm say."""
    if row.get("name"):
        return str(row["name"])
    arm = row.get("arm", "default")
    when = "base model" if row["row"] == 0 else "after 1 task" if row["row"] == 1 else f"after {row['row']} tasks"
    return when if arm == "default" or row["row"] == 0 else f"{when}, {arm}"


def _interval(row: Row) -> Interval | None:
    ends = row.get("interval")
    return Interval(low=float(ends[0]), high=float(ends[1])) if ends else None


def _chart(row: Row) -> View:
    places = range(len(row["layers"]))
    lines = [
        Line(label=label, colour=colour, points=tuple((float(place), float(curve[place])) for place in places))
        for name, label, colour in SEGMENTS
        if any(curve := row["curves"].get(name, []))
    ]
    labels = [str(layer) for layer in row["layers"]]
    drawn = line_chart(
        lines,
        x_labels=labels,
        unit=lambda value: f"{show(100 * value, digits=0 if value >= 0.1 or not value else 1)} %",
        description=f"Share of attention by decoder layer: {_moment(row)}",
    )
    interval = show_interval(_interval(row), scale=1, digits=2)
    note = f"share of attention by decoder layer; shift {show(row['shift'], digits=2)}{f' {interval}' if interval else ''}, n {row['n']}"
    return {"title": _moment(row), "note": note, "svg": drawn}


def _change(base: Row | None, row: Row) -> dict[str, str]:
    """The mean paired difference, over samples that have a shift in both, with its interval."""
    first, second = (base or {}).get("shifts"), row.get("shifts")
    is_paired = base is not None and row is not base and base.get("ids") == row.get("ids") and len(first or ()) == len(second or ())
    pairs = [pair for pair in zip(first or (), second or (), strict=True) if None not in pair] if is_paired else []
    if not pairs:
        return {"change": UNKNOWN, "change_interval": "", "kind": "same"}
    old, new = np.array(pairs).T
    interval = paired_interval(new, old)
    value = float((new - old).mean())
    is_sure = interval is not None and interval.excludes(0.0)
    return {
        "change": show(value, digits=3, is_signed=True),
        "change_interval": show_interval(interval, scale=1, digits=3),
        "kind": ("worse" if value > 0 else "better") if is_sure else "same",
    }
