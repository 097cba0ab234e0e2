"""The tables of `cost_of_routing.py`, and the formulas beside them."""

import statistics
from typing import Any

ARMS = ("base", "oracle", "analytic", "gate")
Row = dict[str, Any]
FORMULAS = """\
n, d: inputs and outputs of a linear layer; r: rank; E: experts; w: width of a prompt's description; L: layers it is taken at.

- stored per expert: 4 sum r(n + d) bytes; gates 4 sum n; analytic router 4 L w(w + 1)/2 + 8 L (w + 1) + 8
- multiply-adds per token beyond the base model: oracle and analytic sum r(n + d), whatever E; gate E sum n for the scores
  + 2 sum r(n + d) for its two best experts
- once per prompt: analytic one more pass of the base model over the prompt + E L w"""


def markdown(found: Row) -> str:
    """Both tables and the formulas."""
    lines = ["| task | " + " | ".join(f"{m} {label}" for label in ("samples", "seconds", "GFLOP", "peak MB") for m in ("routed", "joint"))]
    lines = [lines[0] + " |", "|" + "---|" * 9]
    for ours, theirs in zip(found["arrivals"]["routed"], [None, *found["arrivals"]["joint"]], strict=True):
        pairs = zip(_shown(ours), _shown(theirs), strict=True)
        lines.append(f"| {ours['task'] or 'once'} | " + " | ".join(value for pair in pairs for value in pair) + " |")
    totals = {m: {key: sum(row[key] for row in rows) for key in ("samples", "seconds", "flops")} for m, rows in found["arrivals"].items()}
    ratios = ", ".join(f"{key} {totals['joint'][key] / totals['routed'][key]:.1f}" for key in totals["joint"])
    lines += ["", f"All arrivals together, joint / routed: {ratios}.", "", late_over_early(found), ""]
    lines += ["| experts | " + " | ".join(f"ms/token, {arm}" for arm in ARMS) + " | ms/prompt, base | ms/prompt, analytic |"]
    lines[-1] += " stored MB, analytic | the same on paper | extra multiply-adds, analytic | gate |"
    lines += ["|" + "---|" * (len(ARMS) + 7)]
    for row in found["pools"]:
        paper, known = row["on_paper"], "milliseconds_per_token" in row
        times = [f"{row['milliseconds_per_token'][arm]:.2f}" if known else "–" for arm in ARMS]
        times += [f"{row['milliseconds_per_prompt'][arm]:.1f}" if known else "–" for arm in ("base", "analytic")]
        sizes = [f"{(s['expert'] + s['analytic']) / 1e6:.2f}" if s else "–" for s in (row.get("stored_bytes"), paper["stored_bytes"])]
        shares = [f"{100 * paper['extra_share_per_token'][arm]:.1f} %" for arm in ("analytic", "gate")]
        lines.append(f"| {row['experts']:,} | " + " | ".join([*times, *sizes, *shares]) + " |")
    return "\n".join([*lines, "", FORMULAS, ""])


def _shown(row: Row | None) -> tuple[str, str, str, str]:
    if row is None:
        return ("–",) * 4
    return str(row["samples"]), f"{row['seconds']:.2f}", f"{row['flops'] / 1e9:.2f}", str(row["peak_megabytes"] or "–")


def late_over_early(found: Row) -> str:
    """Whether an arrival costs more for coming late: every task's cost in its later place over that in its earlier one."""
    first = {row["name"]: row for row in found["arrivals"]["routed"] if row["task"]}
    last = {row["name"]: row for row in found["routed_reversed"] if row["task"]}
    pairs = [sorted((first[name], last[name]), key=lambda row: row["task"]) for name in first]
    ratios = {key: [late[key] / early[key] for early, late in pairs] for key in ("samples", "flops", "seconds")}
    shown = (f"{key} {statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})" for key, found in ratios.items())
    return (
        f"The tasks once more in reverse order; a task's later place / its earlier one, median (smallest to largest): {', '.join(shown)}."
    )
