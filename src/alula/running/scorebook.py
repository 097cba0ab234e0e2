"""What a cell keeps of its scores: predictions, the score matrix, costs. What is on disk already is not measured again."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress
from torch import nn

from alula.data.collate import Collator
from alula.data.stream import Stream, Task
from alula.evaluation.evaluate import evaluate_task
from alula.evaluation.few_shot import rescore
from alula.evaluation.prompts import with_prompt_hashes
from alula.evaluation.scores import Prediction, score_task
from alula.files import read_jsonl, write_jsonl
from alula.methods import Arm
from alula.running.shots import Asked
from alula.training.processes import Team

if TYPE_CHECKING:
    from alula.running.cell import Cell

BASE_ARM, JOINT = "default", "joint"


class ScoreBook:
    """The predictions and scores of one cell. Of several processes the main one reads and writes; all measure.

    Args:
        asked: the tasks that are scored with shots, too, by name.

    Raises:
        UserError: one of these has the name of a task.
    """

    def __init__(
        self,
        cell: "Cell",
        stream: Stream,
        model: nn.Module,
        collator: Collator,
        *,
        asked: Mapping[str, Asked],
        progress: Progress | None,
        team: Team,
    ) -> None:
        self.cell, self.model, self.collator, self.asked, self.progress, self.team = cell, model, collator, asked, progress, team
        self.stream = Stream(tasks=stream.tasks, base_tasks=(*stream.base_tasks, *(one.task for one in asked.values())))
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
            known = partial(self._read, shared, *(self.cell.base_folder / f"{name}.jsonl" for name in self._same(task)))
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
            plain = self._plain(task)
            if not self._is_due(plain, seen):
                continue
            sources = [self._path(row, arm.name, name) for name in (task.name, *self._same(task))]
            if arm.is_settled and after not in (JOINT, plain.name):
                settled = (seen.index(plain.name) + 1, arm.name) if plain.name in seen else (0, BASE_ARM)
                sources.append(self._path(*settled, task.name))
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

    def _plain(self, task: Task) -> Task:
        """The task itself, or the one that it is without shots."""
        return self.asked[task.name].parent if task.name in self.asked else task

    def _same(self, task: Task) -> list[str]:
        """Other tasks with the same questions."""
        asked = self.asked.get(task.name)
        return [asked.parent.name] if asked and asked.is_plain else []

    def _is_due(self, task: Task, seen: Sequence[str]) -> bool:
        if task.is_base:
            return self.cell.base_every_task or len(seen) == len(self.stream.tasks)
        return task.name in seen or self.cell.future_tasks

    def _path(self, row: int, arm: str, task: str) -> Path:
        return self.cell.folder / "predictions" / f"row{row:02d}" / arm / f"{task}.jsonl"

    @staticmethod
    def _read(*sources: Path) -> list[dict] | None:
        """What the first of `sources` that is there holds."""
        return next((read_jsonl(path) for path in sources if path.exists()), None)

    def _found(self, known: Callable[[], list[dict] | None], task: Task, way: Arm | None, *, row: int, arm: str) -> list[dict]:
        """The predictions that are `known`, by the word of the main process, or else those that all measure now."""
        found = self.team.from_main(known)
        if found is None:
            return [prediction.as_row() for prediction in self._measure(task, way, row=row, arm=arm)]
        return [{**line, "task": task.name} for line in found]

    def _measure(self, task: Task, way: Arm | None, *, row: int, arm: str) -> list[Prediction]:
        cell = self.cell
        bar = self.progress.add_task(f"row {row}: scoring {task.name} ({arm})", total=len(task.test)) if self.progress else None

        def move(done: int, total: int) -> None:
            if self.progress is not None and bar is not None:
                self.progress.update(bar, completed=done)

        with way.enter(self._plain(task)) if way else contextlib.nullcontext():
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
        found = with_prompt_hashes(found, task, self.collator.processor)
        return rescore(self.asked[task.name].found, found) if task.name in self.asked else found

    def _keep(self, task: Task, found: list[dict], *, row: int, after: str | None, arm: str, seconds: float) -> None:
        if self.team.is_main:
            write_jsonl(self._path(row, arm, task.name), found)
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
            **(self.asked[task.name].about if task.name in self.asked else {}),
        }
        known = self._rows.get((row, arm, task.name), {}).get("seconds", 0.0)  # a row read back took its time before
        self._rows[row, arm, task.name] = {**line, "seconds": round(max(known, seconds), 2)}

    def _write(self) -> None:
        if self.team.is_main:
            write_jsonl(self.cell.folder / "scores.jsonl", self._rows.values())
