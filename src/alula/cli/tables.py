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
    """One row per expert: what it was trained on, and its scores when it was learnt."""
    from alula.pool.manifest import read_manifest

    manifest = read_manifest(folder)
    table = Table("expert", "added", "samples", "steps", "before", "after", "n", title=f"{folder}: base model {manifest['base']['name']}")
    for expert in manifest["experts"]:
        about = expert.get("about", {})
        scores = ["-" if about.get(key) is None else f"{about[key]:.3f}" for key in ("before", "after")]
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
