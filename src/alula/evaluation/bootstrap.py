"""How far a number could move with other test samples, and how far it moved between seeds and orders. numpy only.

Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile interval). Samples are drawn again
within each task, and the same draw serves every row, series and cell of that task: differences are paired.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int16


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What the middle `level` of the resampled values spans. It says nothing of other seeds or orders: see `Spread`."""

    low: float
    high: float
    level: float = 0.95

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2

    def excludes(self, value: float) -> bool:
        """True where `value` lies outside: such a difference is more than sampling noise."""
        return value < self.low or value > self.high


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One number over several cells (seeds, task orders). `sd` is the sample standard deviation, NaN for a single cell."""

    mean: float
    min: float
    max: float
    sd: float
    count: int


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskSamples:
    """What each test sample of one task scored in each row of a score matrix.

    Attributes:
        name: the task; equal names are resampled alike.
        values: score of each sample in each row; a row of NaN where it was not measured.
        weights: bytes of each sample where the task is in bits per byte; None where all count the same.
    """

    name: str
    values: Float[np.ndarray, "rows samples"]
    weights: Float[np.ndarray, " samples"] | None = None


def percentile_interval(values: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval | None:
    """The middle `level` of resampled values; None where there are none, or they could not be computed."""
    values = np.asarray(values, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(low=float(low), high=float(high), level=level)


def draw_counts(num_samples: int, *, resamples: int, seed: int, name: str = "") -> Float[np.ndarray, "resamples samples"]:
    """How often each sample is drawn in each resample: equal for equal `num_samples`, `seed` and `name`."""
    return _drawn(num_samples, resamples, seed, name).astype(float)


@lru_cache(maxsize=32)  # a report asks for the same draws of each of its tasks once for every cell
def _drawn(num_samples: int, resamples: int, seed: int, name: str) -> Int16[np.ndarray, "resamples samples"]:
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return generator.multinomial(num_samples, np.full(num_samples, 1 / num_samples), size=resamples).astype(np.int16)


def bootstrap_interval(
    scores: Sequence[float] | np.ndarray, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval | None:
    """The interval of the mean of per-sample `scores`; None for no scores."""
    values = np.asarray(scores, dtype=float)
    if not len(values):
        return None
    drawn = draw_counts(len(values), resamples=resamples, seed=seed)
    return percentile_interval(drawn @ values / len(values), level=level)


def paired_interval(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval | None:
    """The interval of mean(first) - mean(second) where both hold the same samples in the same order."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} scores came; a paired difference wants the same samples in both.")
    return bootstrap_interval(np.asarray(first, dtype=float) - np.asarray(second, dtype=float), level=level, resamples=resamples, seed=seed)


def resample_rows(tasks: Sequence[TaskSamples], *, resamples: int = 1000, seed: int = 0) -> Float[np.ndarray, "resamples rows tasks"]:
    """A score matrix for each resample: what `ScoreMatrix.summarise` turns into resampled summaries."""
    columns = []
    for task in tasks:
        num_samples = task.values.shape[1]
        if not num_samples:
            columns.append(np.full((resamples, len(task.values)), np.nan))
            continue
        drawn = draw_counts(num_samples, resamples=resamples, seed=seed, name=task.name)
        if task.weights is not None:
            drawn = drawn * task.weights
        columns.append((drawn @ task.values.T) / drawn.sum(-1, keepdims=True))
    return np.stack(columns, axis=-1)


def spread(values: Sequence[float]) -> Spread:
    """Mean, extremes and standard deviation over cells; what is NaN in one cell is NaN in all."""
    found = np.asarray(values, dtype=float)
    if not len(found):
        nothing = float("nan")
        return Spread(mean=nothing, min=nothing, max=nothing, sd=nothing, count=0)
    return Spread(
        mean=float(found.mean()),
        min=float(found.min()),
        max=float(found.max()),
        sd=float(found.std(ddof=1)) if len(found) > 1 else float("nan"),
        count=len(found),
    )
