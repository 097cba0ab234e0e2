"""One cell used one way: its score matrix, what each test sample scored, every measure of both."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from alula.errors import UserError
from alula.evaluation.bootstrap import TaskSamples, resample_rows
from alula.evaluation.matrix import ScoreMatrix
from alula.evaluation.measures import MEASURES
from alula.report.reading import Cell


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One cell of a series, used by one arm.

    Attributes:
        matrix: its scores.
        samples: what each test sample scored, for every column; without values where predictions are missing.
        sources: for each (row, task) the cell and the arm whose predictions are behind the score.
        unparsed: for each (row, task) the number of answers whose form could not be read.
        unread: for every column which of its answers these are in the last row, 0 or 1; NaN where predictions do not tell.
        ids: for every column the test samples of the last row, in the order of `samples`; empty where predictions are missing.
        references: for each series that measures are held against, its cells to compare this one with.
    """

    cell: Cell
    arm: str
    matrix: ScoreMatrix
    samples: tuple[TaskSamples, ...]
    sources: dict[tuple[int, str], Path]
    unparsed: dict[tuple[int, str], int]
    unread: tuple[TaskSamples, ...]
    ids: tuple[tuple[str, ...], ...] = ()
    problems: tuple[str, ...] = ()
    references: dict[str, tuple["Member", ...]] = field(default_factory=dict)

    @property
    def is_single_stage(self) -> bool:
        """True for joint training: between the base model and the end nothing was measured."""
        return self.matrix.num_learnt > 1 and not np.isfinite(self.matrix.rows[1:-1]).any()

    @cached_property
    def resampled_rows(self) -> np.ndarray:
        """A thousand resampled matrices [resamples, rows, columns]."""
        return resample_rows(self.samples)

    @cached_property
    def resampled(self) -> dict[str, np.ndarray]:
        """Every measure of a thousand resampled matrices and of their answers."""
        found = self.matrix.summarise(self.resampled_rows, references=self._references(is_resampled=True))
        return found | self._of_answers(resample_rows(self.unread)[:, -1] * self.matrix.counts)

    @cached_property
    def summaries(self) -> dict[str, float]:
        """Every measure of the matrix and of its answers."""
        unread = np.array([self.unparsed.get((self.matrix.num_learnt, name), np.nan) for name in self.matrix.names])
        values = self.matrix.summarise(references=self._references(is_resampled=False)) | self._of_answers(unread)
        return {name: float(value) for name, value in values.items()}

    def _of_answers(self, unread: np.ndarray) -> dict[str, np.ndarray]:
        """The measures of answers, from how many could not be read in each column [..., columns]."""
        found = {}
        for name, one in MEASURES.items():
            if one.over == "answers":
                columns = self.matrix.columns(one.over)
                found[name] = np.broadcast_to(one.function(unread[..., columns], self.matrix.counts[columns]), unread.shape[:-1])
        return found

    def _references(self, *, is_resampled: bool) -> dict[str, np.ndarray]:
        """For each reference its last row on this cell's columns, mean over the reference's cells."""
        return {
            name: np.mean([member.last_on(self.matrix, is_resampled=is_resampled) for member in members], axis=0)
            for name, members in self.references.items()
        }

    def last_on(self, matrix: ScoreMatrix, *, is_resampled: bool) -> np.ndarray:
        """The last row, or a thousand resampled ones, on the columns of `matrix`; NaN where the samples are not the same."""
        own = self.resampled_rows if is_resampled else self.matrix.rows
        found = np.full((*own.shape[:-2], len(matrix.names)), np.nan)
        for column, name in enumerate(matrix.names):
            if name in self.matrix.names and self.matrix.counts[self.matrix.names.index(name)] == matrix.counts[column]:
                found[..., column] = own[..., -1, self.matrix.names.index(name)]
        return found


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
    bits, ranked = (
        frozenset(name for (_, name), (row, _) in scores.items() if row.get("metric") == scoring) for scoring in ("bits_per_byte", "ranked")
    )
    probes = frozenset(name for (_, name), (row, _) in scores.items() if row.get("is_probe"))
    matrix = ScoreMatrix(
        tasks=tasks, base_tasks=base_tasks, rows=rows, counts=counts, bits_tasks=bits, ranked_tasks=ranked, probe_tasks=probes
    )
    samples, unread, ids, problems = _read_samples(matrix, scores)
    return Member(
        cell=cell,
        arm=arm,
        matrix=matrix,
        samples=samples,
        sources={key: donor.predictions_path(row["row"], row["arm"], key[1]) for key, (row, donor) in scores.items()},
        unparsed={key: row.get("unparsed", 0) for key, (row, _) in scores.items()},
        unread=unread,
        ids=ids,
        problems=(*_disorder(cell), *problems),
    )


def _disorder(cell: Cell) -> list[str]:
    """A sentence where the rows were not learnt in the order that the folder names."""
    learnt = {row["row"]: row["after"] for row in cell.scores if row["row"] > 0 and row.get("after") in cell.tasks}
    wrong = [name for row, name in sorted(learnt.items()) if cell.tasks[row - 1 : row] != (name,)]
    return [f"{cell.name}: {wrong[0]} was not learnt where its order names it ({', '.join(cell.tasks)})."] if wrong else []


def _order(cell: Cell) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tasks in the order of learning, those still to come after them; and base tasks."""
    base = tuple(dict.fromkeys(row["task"] for row in cell.scores if row["is_base"]))
    scored = dict.fromkeys(row["task"] for row in cell.scores if not row["is_base"])
    named = dict.fromkeys([*(name for name in cell.tasks if name in scored), *scored])
    learnt = {row["row"]: row["after"] for row in cell.scores if row["row"] > 0 and row.get("after") in named}
    others = iter([name for name in named if name not in learnt.values()])
    placed = [learnt[row] if row in learnt else next(others, "") for row in range(1, max(len(named), *learnt, 0) + 1)]
    return tuple(name for name in placed if name), base


def _read_samples(
    matrix: ScoreMatrix, scores: dict[tuple[int, str], tuple[dict, Cell]]
) -> tuple[tuple[TaskSamples, ...], tuple[TaskSamples, ...], tuple[tuple[str, ...], ...], list[str]]:
    """Of every column what each sample scored, checked against the stored scores; of the last row which answers are unread, and the ids."""
    columns, answers, ids, problems = [], [], [], []
    for column, name in enumerate(matrix.names):
        values = np.full((len(matrix.rows), int(matrix.counts[column])), np.nan)
        unread, weights = np.full((1, values.shape[1]), np.nan), None
        tested: tuple[str, ...] = ()
        for stage in range(len(matrix.rows)):
            if (stage, name) not in scores:
                continue
            row, cell = scores[stage, name]
            try:
                lines = cell.predictions(row["row"], row["arm"], name)
            except UserError as error:
                problems.append(str(error))
                continue
            if len(lines) != values.shape[1]:
                problems.append(f"{cell.name}, row {stage}, {name}: {len(lines)} predictions for {row['num_samples']} samples.")
                continue
            values[stage] = [line["score"] for line in lines]
            if stage == matrix.num_learnt:
                unread[0] = [1 - line["parsed"] if "parsed" in line else np.nan for line in lines]
                tested = tuple(str(line["id"]) for line in lines)
            if name in matrix.bits_tasks:
                weights = np.array([line.get("bytes", 1) for line in lines], dtype=float)
            mean = float(np.average(values[stage], weights=weights)) if len(lines) else float("nan")
            if abs(mean - row["score"]) > 1e-4:
                problems.append(f"{cell.name}, row {stage}, {name}: score {row['score']:.4f}, predictions give {mean:.4f}.")
        columns.append(TaskSamples(name=name, values=values, weights=weights))
        answers.append(TaskSamples(name=name, values=unread))
        ids.append(tested)
    return tuple(columns), tuple(answers), tuple(ids), problems
