"""The summary of a run or a pool as a table for the terminal."""

from pathlib import Path
from typing import Any

from rich.table import Table


def summary_table(folder: Path) -> Table:
    """One column per method and arm: mean over seeds, standard deviation over seeds, 95 % interval over samples."""
    from alula.report import summary
    from alula.report.definitions import METRICS

    rows: list[dict[str, Any]] = summary(folder)
    seeds = max((len(row["seeds"]) for row in rows), default=0)
    table = Table(
        title=str(folder),
        caption=f"mean ± standard deviation over seeds ({seeds}), \\[95 % bootstrap interval over samples], n samples",
        show_lines=True,
    )
    table.add_column("metric")
    for row in rows:
        table.add_column(f"{row['series']}{' (running)' if row['is_partial'] else ''}", justify="right", overflow="fold")
    for metric in METRICS:
        label = f"{metric.label}\n{metric.unit}, {metric.better} is better"
        table.add_row(label, *(_cell(row["metrics"][metric.name]) for row in rows))
    return table


def pool_table(folder: Path) -> Table:
    """One row per expert: what it was trained on, its scores when it was learnt, and in the last evaluation of the whole pool."""
    from alula.pool.manifest import read_manifest
    from alula.report.pool_page import moments

    manifest = read_manifest(folder)
    table = Table(
        *("expert", "added", "samples", "steps", "before", "after", "now", "n"),
        title=f"{folder}: base model {manifest['base']['name']}",
        caption="before, after: when it was learnt; now: in the last `alula eval`",
    )
    for expert in manifest["experts"]:
        about, now = expert.get("about", {}), moments(folder, expert["name"])[2]
        scores = ["-" if score is None else f"{score:.3f}" for score in (about.get("before"), about.get("after"), now.score)]
        if now.rows and len(now.rows) != about.get("test_samples"):
            scores[-1] += f" (n = {len(now.rows)})"
        counts = [str(about.get(key, "-")) for key in ("samples", "steps")]
        table.add_row(expert["name"], expert.get("added", "-"), *counts, *scores, str(about.get("test_samples", "-")))
    return table


def _cell(metric: dict[str, Any]) -> str:
    if metric["mean"] is None:
        return "-"
    digits = 3 if metric["unit"] == "bits" else 1
    spread = f" ± {metric['sd']:.{digits}f}" if metric["sd"] is not None else ""
    interval = f"\n\\[{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]" if metric["low"] is not None else ""
    return f"{metric['mean']:.{digits}f}{spread}{interval}\nn = {metric['samples']}"
