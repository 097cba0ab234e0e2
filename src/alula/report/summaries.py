"""What a run adds up to as plain numbers: a row for each series, with every measure."""

from pathlib import Path

import numpy as np

from alula.evaluation.measures import MEASURES, Measure
from alula.report.reading import read_run
from alula.report.series import Series, series_of


def summarise_metric(series: Series, metric: Measure) -> dict[str, float | int | str | None]:
    """One cell of the summary table, in the unit of `metric`; what is not known is None."""
    over_cells, interval, scale = series.spread(metric.name), series.interval(metric.name), metric.scale

    def shown(value: float | None) -> float | None:
        return None if value is None or not np.isfinite(value) else value * scale

    return {
        "unit": metric.unit,
        "mean": shown(over_cells.mean),
        "sd": shown(over_cells.sd),
        "min": shown(over_cells.min),
        "max": shown(over_cells.max),
        "low": shown(interval.low) if interval else None,
        "high": shown(interval.high) if interval else None,
        "samples": series.num_samples(metric.name),
        "seeds": len(series.seeds),
        "orders": len(series.orders),
        "cells": over_cells.count,
    }


def summarise_series(series: Series) -> dict[str, object]:
    """One row of the summary table."""
    return {
        "series": series.name,
        "method": series.method,
        "arm": series.arm,
        "seeds": series.seeds,
        "orders": series.orders,
        "states": {cell.name: cell.state for cell in series.cells},
        "is_partial": series.is_partial,
        "is_reference": series.is_reference,
        "tasks_learnt": max((member.matrix.num_learnt for member in series.members), default=0),
        "metrics": {name: summarise_metric(series, measure) for name, measure in MEASURES.items()},
    }


def summary(run_folder: Path | str) -> list[dict[str, object]]:
    """One row for each series of a finished or running run, best average score first: what the CLI prints.

    Values are in `unit` (points, bits, %); `low` and `high` are the 95 % bootstrap interval, `sd` is over cells (seeds and orders).

    Raises:
        UserError: `run_folder` is not a run folder.
    """
    return [summarise_series(series) for series in series_of(read_run(run_folder))]
