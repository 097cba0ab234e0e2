"""What the run folder adds up to: a score matrix for each cell and arm, summaries over seeds, their intervals."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from alula.evaluation.bootstrap import Interval, Spread, TaskSamples, percentile_interval, resample_rows, spread
from alula.evaluation.matrix import ScoreMatrix
from alula.report.definitions import METRICS, OTHER_METRICS, Metric
from alula.report.reading import Cell, Run, read_run

REFERENCES = ("joint", "oracle")


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One cell of a series, used by one arm.

    Attributes:
        matrix: its scores.
        samples: what each test sample scored, for every column; without values where predictions are missing.
        sources: for each (row, task) the cell and the arm whose predictions are behind the score.
        unparsed: for each (row, task) the number of answers whose form could not be read.
    """

    cell: Cell
    arm: str
    matrix: ScoreMatrix
    samples: tuple[TaskSamples, ...]
    sources: dict[tuple[int, str], Path]
    unparsed: dict[tuple[int, str], int]
    problems: tuple[str, ...] = ()

    @property
    def is_single_stage(self) -> bool:
        """True for joint training: between the base model and the end nothing was measured."""
        return self.matrix.num_learnt > 1 and not np.isfinite(self.matrix.rows[1:-1]).any()

    @cached_property
    def resampled(self) -> dict[str, np.ndarray]:
        """Every summary of a thousand resampled matrices."""
        return self.matrix.summarise(resample_rows(self.samples)) | {"unparsed_share": np.array([])}

    @cached_property
    def summaries(self) -> dict[str, float]:
        """Every summary of the matrix, and the share of unparsed answers on the tasks seen."""
        found = {name: float(value) for name, value in self.matrix.summarise().items()}
        seen = [self.matrix.tasks[column] for column in self.matrix.seen]
        answers = sum(int(self.matrix.counts[column]) for column in self.matrix.seen)
        unread = [self.unparsed.get((self.matrix.num_learnt, name)) for name in seen]
        known = answers > 0 and None not in unread
        return found | {"unparsed_share": sum(number or 0 for number in unread) / answers if known else float("nan")}


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """A method and an arm over all its seeds. What counts are its finished cells; without one, those there are."""

    method: str
    arm: str
    members: tuple[Member, ...]
    cells: tuple[Cell, ...] = field(default=())

    @property
    def name(self) -> str:
        """How the series is shown."""
        return self.method if self.arm == "default" else f"{self.method}:{self.arm}"

    @property
    def is_reference(self) -> bool:
        """True for what no continual learner may do: see all tasks at once, or be told the task."""
        return self.method in REFERENCES or self.arm in REFERENCES

    @property
    def is_partial(self) -> bool:
        """True where no cell has finished: the last row is not the end of the stream."""
        return bool(self.members) and all(member.cell.state != "finished" for member in self.members)

    def spread(self, metric: str) -> Spread:
        """A summary over seeds."""
        return spread([member.summaries[metric] for member in self.members])

    def resampled(self, metric: str) -> np.ndarray:
        """The mean over seeds of a summary, for each resample; empty where predictions are missing."""
        draws = [member.resampled[metric] for member in self.members]
        return np.mean(draws, axis=0) if draws and all(len(draw) for draw in draws) else np.array([])

    def interval(self, metric: str) -> Interval | None:
        """The bootstrap interval of the mean over seeds."""
        return percentile_interval(self.resampled(metric))

    def num_samples(self, metric: str) -> int:
        """Test samples behind a summary, in one seed."""
        if not self.members:
            return 0
        matrix = self.members[0].matrix
        base = metric.startswith("base_")
        names = matrix.base_tasks if base else tuple(matrix.tasks[column] for column in matrix.seen)
        wanted = [name for name in names if (name in matrix.bits_tasks) == (metric == "base_bits_increase")]
        if metric in ("backward_transfer", "forgetting"):
            wanted = wanted[:-1]
        elif metric == "forward_transfer":
            wanted = wanted[1:]
        return sum(int(matrix.counts[matrix.names.index(name)]) for name in wanted)

    def alike(self) -> list[Member]:
        """The members whose tasks came in the order of the first one: their matrices can be averaged."""
        return [m for m in self.members if m.matrix.names == self.members[0].matrix.names and _same_size(m, self.members)]

    def mean_rows(self) -> np.ndarray:
        """The score matrix, averaged over the seeds that share an order."""
        return np.mean([member.matrix.rows for member in self.alike()], axis=0)


def _same_size(member: Member, members: tuple[Member, ...]) -> bool:
    return member.matrix.rows.shape == members[0].matrix.rows.shape


def series_of(run: Run) -> list[Series]:
    """Every series of a run, the best average score first; cells that never scored are left to the list of cells."""
    base = [cell for cell in run.cells if any(row["row"] == 0 for row in cell.scores)]
    grouped: dict[tuple[str, str], list[Cell]] = {}
    for cell in run.cells:
        for arm in cell.arms:
            grouped.setdefault((cell.method, arm), []).append(cell)
    found = []
    for (method, arm), cells in grouped.items():
        finished = [cell for cell in cells if cell.state == "finished"]
        members = tuple(read_member(cell, arm, base=base) for cell in finished or cells)
        found.append(Series(method=method, arm=arm, members=members, cells=tuple(cells)))
    return sorted(found, key=lambda series: -np.nan_to_num(series.spread("average_score").mean, nan=-1.0))


def read_member(cell: Cell, arm: str, *, base: list[Cell]) -> Member:
    """The scores and predictions of `cell` used by `arm`; the base row comes from any cell that has it.

    Row 0 is the untouched model: it is the same for every method, seed and arm, and may be stored once.
    """
    scores: dict[tuple[int, str], tuple[dict, Cell]] = {}
    names = {row["task"] for row in cell.scores}
    for donor in [*reversed([other for other in base if other is not cell]), cell]:
        lines = [row for row in donor.scores if row["row"] == 0 and row["task"] in names]
        scores |= {(0, row["task"]): (row, donor) for row in sorted(lines, key=lambda row: row["arm"] == arm)}
    tasks, base_tasks = _order(cell)
    for row in (row for row in cell.scores if row["row"] > 0 and row["arm"] == arm):
        stage = row["row"] if row.get("after") in tasks else len(tasks)  # joint: one stage that ends the stream
        scores[stage, row["task"]] = (row, cell)
    rows = np.full((1 + max((stage for stage, _ in scores), default=0), len(tasks) + len(base_tasks)), np.nan)
    counts = np.zeros(rows.shape[1], dtype=int)
    columns = {name: column for column, name in enumerate((*tasks, *base_tasks))}
    for (stage, name), (row, _) in scores.items():
        rows[stage, columns[name]] = row["score"]
        counts[columns[name]] = row["num_samples"]
    bits = frozenset(name for (_, name), (row, _) in scores.items() if row.get("metric") == "bits_per_byte")
    matrix = ScoreMatrix(tasks=tasks, base_tasks=base_tasks, rows=rows, counts=counts, bits_tasks=bits)
    samples, problems = _read_samples(matrix, scores)
    return Member(
        cell=cell,
        arm=arm,
        matrix=matrix,
        samples=samples,
        sources={key: donor.predictions_path(row["row"], row["arm"], key[1]) for key, (row, donor) in scores.items()},
        unparsed={key: row.get("unparsed", 0) for key, (row, _) in scores.items()},
        problems=tuple(problems),
    )


def _order(cell: Cell) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tasks in the order of learning, those still to come after them; and base tasks."""
    base = tuple(dict.fromkeys(row["task"] for row in cell.scores if row["is_base"]))
    named = dict.fromkeys(row["task"] for row in cell.scores if not row["is_base"])
    learnt = {row["row"]: row["after"] for row in cell.scores if row["row"] > 0 and row.get("after") in named}
    others = iter([name for name in named if name not in learnt.values()])
    placed = [learnt[row] if row in learnt else next(others, "") for row in range(1, max(len(named), *learnt, 0) + 1)]
    return tuple(name for name in placed if name), base


def _read_samples(matrix: ScoreMatrix, scores: dict[tuple[int, str], tuple[dict, Cell]]) -> tuple[tuple[TaskSamples, ...], list[str]]:
    """Per-sample scores of every column, checked against the stored scores."""
    columns, problems = [], []
    for column, name in enumerate(matrix.names):
        values = np.full((len(matrix.rows), int(matrix.counts[column])), np.nan)
        weights = None
        for stage in range(len(matrix.rows)):
            if (stage, name) not in scores:
                continue
            row, cell = scores[stage, name]
            lines = cell.predictions(row["row"], row["arm"], name)
            if len(lines) != values.shape[1]:
                problems.append(f"{cell.name}, row {stage}, {name}: {len(lines)} predictions for {row['num_samples']} samples.")
                continue
            values[stage] = [line["score"] for line in lines]
            if name in matrix.bits_tasks:
                weights = np.array([line.get("bytes", 1) for line in lines], dtype=float)
            mean = float(np.average(values[stage], weights=weights)) if len(lines) else float("nan")
            if abs(mean - row["score"]) > 1e-4:
                problems.append(f"{cell.name}, row {stage}, {name}: score {row['score']:.4f}, predictions give {mean:.4f}.")
        columns.append(TaskSamples(name=name, values=values, weights=weights))
    return tuple(columns), problems


def summarise_metric(series: Series, metric: Metric) -> dict[str, float | int | str | None]:
    """One cell of the summary table, in the unit of `metric`; what is not known is None."""
    over_seeds, interval, scale = series.spread(metric.name), series.interval(metric.name), metric.scale

    def shown(value: float | None) -> float | None:
        return None if value is None or not np.isfinite(value) else value * scale

    return {
        "unit": metric.unit,
        "mean": shown(over_seeds.mean),
        "sd": shown(over_seeds.sd),
        "min": shown(over_seeds.min),
        "max": shown(over_seeds.max),
        "low": shown(interval.low) if interval else None,
        "high": shown(interval.high) if interval else None,
        "samples": series.num_samples(metric.name),
        "seeds": over_seeds.count,
    }


def summarise_series(series: Series) -> dict[str, object]:
    """One row of the summary table."""
    return {
        "series": series.name,
        "method": series.method,
        "arm": series.arm,
        "seeds": [member.cell.seed for member in series.members],
        "states": {cell.name: cell.state for cell in series.cells},
        "is_partial": series.is_partial,
        "is_reference": series.is_reference,
        "tasks_learnt": max((member.matrix.num_learnt for member in series.members), default=0),
        "metrics": {metric.name: summarise_metric(series, metric) for metric in (*METRICS, *OTHER_METRICS)},
    }


def summary(run_folder: Path | str) -> list[dict[str, object]]:
    """One row for each series of a finished or running run, best average score first: what the CLI prints.

    Values are in `unit` (points, bits, %); `low` and `high` are the 95 % bootstrap interval, `sd` is over seeds.

    Raises:
        UserError: `run_folder` is not a run folder.
    """
    return [summarise_series(series) for series in series_of(read_run(run_folder))]
