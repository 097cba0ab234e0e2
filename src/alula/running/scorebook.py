"""What a cell keeps of its scores: predictions, the score matrix, costs. What is on disk already is not measured again."""

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress
from torch import nn

from alula.data.collate import Collator
from alula.data.stream import Stream, Task
from alula.evaluation.evaluate import evaluate_task
from alula.evaluation.scores import Prediction, score_task
from alula.files import read_jsonl, write_jsonl
from alula.methods import Arm
from alula.training.processes import Team

if TYPE_CHECKING:
    from alula.running.cell import Cell

BASE_ARM, JOINT = "default", "joint"


class ScoreBook:
    """The predictions and scores of one cell. Of several processes the main one reads and writes; all measure."""

    def __init__(
        self, cell: "Cell", stream: Stream, model: nn.Module, collator: Collator, *, progress: Progress | None, team: Team
    ) -> None:
        self.cell, self.stream, self.model, self.collator, self.progress = cell, stream, model, collator, progress
        self.team = team
        self._rows: dict[tuple[int, str, str], dict[str, Any]] = {}
        self._costs: dict[str, dict] = {}
        scores = cell.folder / "scores.jsonl"
        if scores.exists():
            self._rows = {(row["row"], row["arm"], row["task"]): row for row in read_jsonl(scores)}
        costs = cell.folder / "cost.jsonl"
        if costs.exists():
            self._costs = {row["task"]: row for row in read_jsonl(costs)}

    def score_base(self) -> None:
        """Row 0, measured once for all cells of the run."""
        for task in self._tasks():
            shared = self.cell.base_folder / f"{task.name}.jsonl"
            started = time.perf_counter()
            known = partial(self._read, shared)
            found = self._found(known, task, None, row=0, arm=BASE_ARM)
            if self.team.is_main and not shared.exists():
                write_jsonl(shared, found)
            own = [{**row, "method": self.cell.shown, "seed": self.cell.seed} for row in found]
            self._keep(task, own, row=0, after=None, arm=BASE_ARM, seconds=time.perf_counter() - started)
        self._write()

    def score_row(self, row: int, after: str, arm: Arm) -> None:
        """All tasks after task `after`, used the way of `arm`."""
        seen = [task.name for task in self.stream.tasks[:row]] if after != JOINT else [task.name for task in self.stream.tasks]
        for task in self._tasks():
            if not self._is_due(task, seen):
                continue
            sources = [self._path(row, arm.name, task)]
            if arm.is_settled and after not in (JOINT, task.name):
                settled = (seen.index(task.name) + 1, arm.name) if task.name in seen else (0, BASE_ARM)
                sources.append(self._path(*settled, task))
            started = time.perf_counter()
            found = self._found(partial(self._read, *sources), task, arm, row=row, arm=arm.name)
            self._keep(task, found, row=row, after=after, arm=arm.name, seconds=time.perf_counter() - started)
        self._write()

    def values(self, row: int) -> dict[str, float]:
        """The scores of one row, for trackers."""
        return {f"score/{task} ({arm})": line["score"] for (at, arm, task), line in self._rows.items() if at == row}

    def keep_cost(self, row: dict[str, Any]) -> None:
        """One task's cost."""
        self._costs[row["task"]] = row
        if self.team.is_main:
            write_jsonl(self.cell.folder / "cost.jsonl", self._costs.values())

    def _tasks(self) -> Sequence[Task]:
        return (*self.stream.tasks, *self.stream.base_tasks)

    def _is_due(self, task: Task, seen: Sequence[str]) -> bool:
        if task.is_base:
            return self.cell.base_every_task or len(seen) == len(self.stream.tasks)
        return task.name in seen or self.cell.future_tasks

    def _path(self, row: int, arm: str, task: Task) -> Path:
        return self.cell.folder / "predictions" / f"row{row:02d}" / arm / f"{task.name}.jsonl"

    @staticmethod
    def _read(*sources: Path) -> list[dict] | None:
        """What the first of `sources` that is there holds."""
        return next((read_jsonl(path) for path in sources if path.exists()), None)

    def _found(self, known: Callable[[], list[dict] | None], task: Task, way: Arm | None, *, row: int, arm: str) -> list[dict]:
        """The predictions that are `known`, by the word of the main process, or else those that all measure now."""
        found = self.team.from_main(known)
        return [prediction.as_row() for prediction in self._measure(task, way, row=row, arm=arm)] if found is None else found

    def _measure(self, task: Task, way: Arm | None, *, row: int, arm: str) -> list[Prediction]:
        cell = self.cell
        bar = self.progress.add_task(f"row {row}: scoring {task.name} ({arm})", total=len(task.test)) if self.progress else None

        def move(done: int, total: int) -> None:
            if self.progress is not None and bar is not None:
                self.progress.update(bar, completed=done)

        with way.enter(task) if way else contextlib.nullcontext():
            found = evaluate_task(
                self.model,
                self.collator,
                task,
                batch_size=cell.batch_size,
                progress=move,
                seed=cell.seed,
                method=cell.shown,
                around=way.around if way else None,
                team=self.team,
            )
        if self.progress is not None and bar is not None:
            self.progress.remove_task(bar)
        return found

    def _keep(self, task: Task, found: list[dict], *, row: int, after: str | None, arm: str, seconds: float) -> None:
        if self.team.is_main:
            write_jsonl(self._path(row, arm, task), found)
        predictions = [Prediction(**{**line, "options": tuple(line.get("options", ()))}) for line in found]
        score = score_task(task, predictions)
        line = {
            "row": row,
            "after": after,
            "arm": arm,
            "task": task.name,
            "is_base": task.is_base,
            "is_probe": task.is_probe,
            **vars(score),
        }
        known = self._rows.get((row, arm, task.name), {}).get("seconds", 0.0)  # a row read back took its time before
        self._rows[row, arm, task.name] = {**line, "seconds": round(max(known, seconds), 2)}

    def _write(self) -> None:
        if self.team.is_main:
            write_jsonl(self.cell.folder / "scores.jsonl", self._rows.values())
