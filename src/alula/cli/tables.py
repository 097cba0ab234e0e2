"""The summary of a run as a table for the terminal."""

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
        cells = [_cell(metrics[metric.name]) for metric in METRICS]
        table.add_row(f"{row['series']}{' (running)' if row['is_partial'] else ''}", str(len(row["seeds"])), *cells)
    return table


def _cell(metric: dict[str, Any]) -> str:
    if metric["mean"] is None:
        return "-"
    digits = 3 if metric["unit"] == "bits" else 1
    spread = f" ± {metric['sd']:.{digits}f}" if metric["sd"] is not None else ""
    interval = f"\n[{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]" if metric["low"] is not None else ""
    return f"{metric['mean']:.{digits}f}{spread}{interval.replace('[', chr(92) + '[')}\nn = {metric['samples']}"
