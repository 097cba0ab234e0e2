"""The summary of a run or a pool as a table for the terminal."""

from pathlib import Path
from typing import Any

from rich.table import Table


def summary_table(folder: Path) -> Table:
    """One row per method and arm: mean over seeds, standard deviation over seeds, 95 % interval over samples."""
    from alula.report import summary
    from alula.report.definitions import METRICS

    rows = summary(folder)
    table = Table(title=f"{folder}", caption="mean ± standard deviation over seeds [95 % bootstrap interval over samples], n samples")
    table.add_column("method", no_wrap=True)
    table.add_column("seeds")
    for metric in METRICS:
        table.add_column(f"{metric.label}\n({metric.unit}, {metric.better} is better)", justify="right")
    for row in rows:
        metrics: Any = row["metrics"]
        seeds: Any = row["seeds"]
        cells = [_cell(metrics[metric.name]) for metric in METRICS]
        table.add_row(f"{row['series']}{' (running)' if row['is_partial'] else ''}", str(len(seeds)), *cells)
    return table


def pool_table(folder: Path) -> Table:
    """One row per expert: what it was trained on, and its scores when it was learnt."""
    from alula.report.pool_page import read_pool

    manifest = read_pool(folder)
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
    interval = f"\n[{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]" if metric["low"] is not None else ""
    return f"{metric['mean']:.{digits}f}{spread}{interval.replace('[', chr(92) + '[')}\nn = {metric['samples']}"
