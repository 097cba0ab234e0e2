"""One cell of a run: one method, one seed, one stream; trained, scored after each task, written down."""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import nn

from alula.data.collate import Collator
from alula.data.stream import Stream, Task, merge_tasks
from alula.errors import UserError
from alula.evaluation.evaluate import evaluate_task
from alula.evaluation.scores import Prediction, score_task
from alula.files import read_jsonl, write_json, write_jsonl
from alula.methods import METHODS, Arm, Method, compose
from alula.running.attention import keep_attention_shift
from alula.running.diagnosis import diagnose
from alula.training import Trainer, TrainSettings

BASE_ARM = "default"
JOINT = "joint"
ORDER, DONE, CRASHED = "order.json", "done.json", "crashed.json"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What identifies a cell, and where it is written.

    Attributes:
        base_folder: where row 0 (the untouched model's predictions) is kept for all cells of the run.
        attention_shift: test samples of which the attention shift is measured before and after learning.
        tasks: their order; empty: that of the stream.
        joint: train on all tasks at once.
        additions: what is added to the method: names and options, in the order in which they work.
    """

    method: str
    seed: int
    settings: TrainSettings
    options: Mapping[str, Any]
    folder: Path
    base_folder: Path
    batch_size: int
    future_tasks: bool = True
    examples: int = 0
    attention_shift: int = 0
    trackers: tuple[str, ...] = ()
    identity: str = ""
    label: str = ""
    tasks: tuple[str, ...] = ()
    joint: bool = False
    additions: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @property
    def name(self) -> str:
        """The name of its folder, unlike that of any other cell of the run."""
        return self.folder.name

    @property
    def shown(self) -> str:
        """The method's name in the report: its label, if the recipe gave one."""
        return self.label or self.method

    @property
    def is_done(self) -> bool:
        """Whether every row was scored."""
        return (self.folder / DONE).exists()


def run_cell(cell: Cell, stream: Stream, load: Callable[[], tuple[nn.Module, Any]], *, progress: Progress | None = None) -> None:
    """Trains and scores one cell, from where an interrupted run left it.

    Args:
        load: gives the untouched model and its processor.

    Raises:
        UserError: whatever the data, the method's options or the training make impossible.
    """
    started = time.time()
    if cell.tasks:
        write_json(cell.folder / ORDER, {"tasks": list(cell.tasks)})
    stream = in_order(stream, cell.tasks)
    model, processor = load()
    collator = Collator(processor)
    book = ScoreBook(cell, stream, model, collator, progress=progress)
    book.score_base()
    shift: dict[str, Any] = {"folder": cell.folder, "num_samples": cell.attention_shift}
    keep_attention_shift(model, collator, stream, row=0, arm=None, **shift)
    method = make_method(cell, model, collator)
    trainer = Trainer(
        model,
        method,
        collator,
        settings=cell.settings,
        folder=cell.folder,
        trackers=cell.trackers,
        progress=progress,
        identity=cell.identity,
    )
    learning = Stream(tasks=(merge_tasks(stream),), base_tasks=stream.base_tasks) if cell.joint else stream
    for learnt in trainer.learn(learning):
        book.keep_cost(learnt.cost.row())
        for arm in method.arms():
            book.score_row(learnt.index + 1, learnt.task.name, arm)
    keep_attention_shift(model, collator, stream, row=len(learning.tasks), arm=method.arms()[0], **shift)
    diagnose(method, model, collator, stream, folder=cell.folder, num_examples=cell.examples)
    write_json(cell.folder / DONE, {"finished": True, "seconds_of_this_process": round(time.time() - started, 1)})


def make_method(cell: Cell, model: nn.Module, collator: Collator) -> Method:
    """The cell's method on `model`, with its additions.

    Raises:
        UserError: an unknown method or addition, options it does not take, or an addition that does not fit the method.
    """
    kind = METHODS[cell.method]
    try:
        method = kind(model, settings=cell.settings, **cell.options)
    except TypeError as error:
        raise UserError(f"Method '{cell.method}' cannot be made with {dict(cell.options)}: {error}. Correct its options.") from error
    return compose(model, method, cell.additions, collator=collator) if cell.additions else method


class ScoreBook:
    """Keeps a cell's predictions and scores; what is on disk already is not measured again."""

    def __init__(self, cell: Cell, stream: Stream, model: nn.Module, collator: Collator, *, progress: Progress | None) -> None:
        self.cell, self.stream, self.model, self.collator, self.progress = cell, stream, model, collator, progress
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
            if not shared.exists():
                write_jsonl(shared, [found.as_row() for found in self._measure(task, None, row=0, arm=BASE_ARM)])
            own = [{**row, "method": self.cell.shown, "seed": self.cell.seed} for row in read_jsonl(shared)]
            self._keep(task, own, row=0, after=None, arm=BASE_ARM, seconds=time.perf_counter() - started)
        self._write()

    def score_row(self, row: int, after: str, arm: Arm) -> None:
        """All tasks after task `after`, used the way of `arm`."""
        seen = [task.name for task in self.stream.tasks[:row]] if after != JOINT else [task.name for task in self.stream.tasks]
        for task in self._tasks():
            if not (task.is_base or task.name in seen or self.cell.future_tasks):
                continue
            path = self._path(row, arm.name, task)
            started = time.perf_counter()
            if path.exists():
                found = read_jsonl(path)
            elif arm.is_settled and after not in (JOINT, task.name):
                former = self._path(seen.index(task.name) + 1, arm.name, task) if task.name in seen else self._path(0, BASE_ARM, task)
                found = read_jsonl(former)
            else:
                found = [prediction.as_row() for prediction in self._measure(task, arm, row=row, arm=arm.name)]
            seconds = time.perf_counter() - started
            self._keep(task, found, row=row, after=after, arm=arm.name, seconds=seconds)
        self._write()

    def keep_cost(self, row: dict[str, Any]) -> None:
        """One task's cost."""
        self._costs[row["task"]] = row
        write_jsonl(self.cell.folder / "cost.jsonl", self._costs.values())

    def _tasks(self) -> Sequence[Task]:
        return (*self.stream.tasks, *self.stream.base_tasks)

    def _path(self, row: int, arm: str, task: Task) -> Path:
        return self.cell.folder / "predictions" / f"row{row:02d}" / arm / f"{task.name}.jsonl"

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
            )
        if self.progress is not None and bar is not None:
            self.progress.remove_task(bar)
        return found

    def _keep(self, task: Task, found: list[dict], *, row: int, after: str | None, arm: str, seconds: float) -> None:
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
        write_jsonl(self.cell.folder / "scores.jsonl", self._rows.values())


def in_order(stream: Stream, names: Sequence[str]) -> Stream:
    """`stream` with its tasks in the order of `names`; as it is for no names."""
    tasks = {task.name: task for task in stream.tasks}
    return replace(stream, tasks=tuple(tasks[name] for name in names)) if names else stream


def limited(task: Task, *, train_size: int | None, test_size: int | None) -> Task:
    """`task` with at most so many samples, the first ones."""
    return replace(task, train=task.train[:train_size], test=task.test[:test_size])
