"""The tables of `experts.py`: ratios of medians, each bar beside its ratio as met or missed."""

from typing import Any

Row = dict[str, Any]
FEW = 8
"""Experts up to which peers that compute every expert are measured; ours goes on alone."""


def bar(ratio: float, limit: float, *, at_least: bool = False, least: float | None = None) -> str:
    """A ratio beside its bar, and beside what no form can go below (`roofline.py`)."""
    met = ratio >= limit if at_least else ratio <= limit
    sign = "≥" if at_least else "≤"
    roof = f"; floor {least:.2f}" if least is not None else ""
    return f"{ratio:.2f} ({sign} {limit:g}: {'met' if met else 'missed'}{roof})"


def layer_table(rows: list[Row]) -> list[str]:
    lines = [
        "| experts | ours / LoRA, train | forward | CoIN / ours, train | saved for backward, CoIN / ours | ours / LoRA |",
        "|" + "---|" * 6,
    ]
    for row in rows:
        lora, loop, mine = ("PEFT LoRA", "CoIN's loop", "ours")
        train, forward, saved = row["train"], row["forward"], row["saved"]
        eight = row["experts"] == FEW
        faster, smaller = train[loop] / train[mine], saved[loop] / saved[mine]
        most = train[loop] / train[lora] / row["least"]["train"]
        shown = (
            [bar(faster, 2.2, at_least=True, least=most), bar(smaller, 7, at_least=True)] if eight else [f"{faster:.2f}", f"{smaller:.2f}"]
        )
        cells = [
            bar(train[mine] / train[lora], 1.05, least=row["least"]["train"]),
            bar(forward[mine] / forward[lora], 1.05, least=row["least"]["forward"]),
            *shown,
            bar(saved[mine] / saved[lora], 1.1),
        ]
        lines.append(f"| {row['experts']} | " + " | ".join(cells) + " |")
    return lines


TRAIN_BARS = {("2048 wide", 8): 1.15, ("2048 wide", 32): 1.25, ("2048 wide", 256): 1.4, ("512 wide", 32): 1.5}


def whole_table(rows: list[Row]) -> list[str]:
    lines = ["| model | experts | form | train / LoRA | forward / LoRA | saved / LoRA | peak / LoRA | its train / ours |", "|" + "---|" * 8]
    for row in rows:
        train, forward, saved, peak = row["train"], row["forward"], row["saved"], row["peak"]
        limit = TRAIN_BARS.get((row["model"], row["experts"]))
        for form in train:
            ratio, theirs = train[form] / train["PEFT LoRA"], train[form] / train["ours"]
            first = bar(ratio, limit, least=row["least"]) if form == "ours" and limit else f"{ratio:.2f}"
            beaten = row["experts"] == FEW and form in ("PEFT Arrow", "PEFT X-LoRA")
            kept = f"{saved[form] / saved['PEFT LoRA']:.2f}" if form in saved else "–"
            high = f"{peak[form] / peak['PEFT LoRA']:.2f}" if peak.get(form) and peak.get("PEFT LoRA") else "–"
            if beaten and form == "PEFT Arrow" and peak.get(form) and peak.get("ours"):
                high += f"; ours / its {bar(peak['ours'] / peak[form], 0.5)}"
            last = bar(theirs, 2.5, at_least=True, least=ratio / row["least"]) if beaten else f"{theirs:.2f}"
            cells = (row["model"], str(row["experts"]), form, first, f"{forward[form] / forward['PEFT LoRA']:.2f}", kept, high, last)
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def decode_table(rows: list[Row]) -> list[str]:
    lines = ["| model | pool | form | seconds per token / base | tokens per second / base |", "|" + "---|" * 5]
    for row in rows:
        base = row["decode"]["frozen base"]
        for form, seconds in row["decode"].items():
            ratio, ours = seconds / base, form.startswith("ours") and row["experts"] == 64
            first = bar(ratio, 1.15, least=row["least"][form]) if ours else f"{ratio:.2f}"
            lines.append(f"| {row['model']} | {row['experts']} | {form} | {first} | {1 / ratio:.2f} |")
    return lines
