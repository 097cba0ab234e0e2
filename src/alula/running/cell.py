"""One cell of a run: one method, one seed, one stream; trained, scored after each task, written down."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import nn

from alula.data.collate import Collator
from alula.data.stream import Stream, Task, merge_tasks
from alula.experts.sparse_ffn import is_sparse
from alula.files import write_json
from alula.methods import METHODS, FinetuneFull, JointFull, Method, compose
from alula.models.image_cache import cache_images
from alula.running.attention import FILE as ATTENTION_SHIFT
from alula.running.attention import keep_attention_shift
from alula.running.diagnosis import diagnose
from alula.running.packed import packing_collator
from alula.running.scorebook import ScoreBook
from alula.running.shots import ask_with_shots
from alula.running.sparse import keep_load
from alula.training import Trainer, TrainSettings
from alula.training.processes import Team
from alula.training.sharding import is_sharded

ORDER, DONE, CRASHED = "order.json", "done.json", "crashed.json"
BALANCE, TRAIN_GATES = "balance", (FinetuneFull, JointFull)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What identifies a cell, and where it is written.

    Attributes:
        base_folder: where row 0 (the untouched model's predictions) is kept for all cells of the run.
        pack: tokens of a row in which several samples stand in training; None: one a row.
        shots: solved examples before each question with which all tasks are scored too; `shots_by`: how they are chosen; `shots_as`:
            how they are written.
        attention_shift: test samples of which the attention shift is measured before and after learning.
        tasks: their order; empty: that of the stream.
        joint: train on all tasks at once.
        additions: what is added to the method: names and options, in the order in which they work.
        image_cache: the folder of features that cells share; None: images are encoded each time.
    """

    method: str
    seed: int
    settings: TrainSettings
    options: Mapping[str, Any]
    folder: Path
    base_folder: Path
    batch_size: int
    future_tasks: bool = True
    base_row: bool = True
    base_every_task: bool = True
    pack: int | None = None
    shots: tuple[int, ...] = ()
    shots_by: str = "seed"
    shots_as: str = "chat"
    examples: int = 0
    attention_shift: int = 0
    trackers: tuple[str, ...] = ()
    identity: str = ""
    label: str = ""
    tasks: tuple[str, ...] = ()
    joint: bool = False
    additions: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    image_cache: Path | None = None

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


def run_cell(
    cell: Cell,
    stream: Stream,
    load: Callable[[], tuple[nn.Module, Any]],
    *,
    progress: Progress | None = None,
    team: Team | None = None,
) -> None:
    """Trains and scores one cell, from where an interrupted run left it.

    Args:
        load: gives the untouched model and its processor.
        team: the processes that work on this cell together; the main one alone writes.

    Raises:
        UserError: whatever the data, the method's options or the training make impossible.
    """
    started, team = time.time(), team or Team()
    if cell.tasks and team.is_main:
        write_json(cell.folder / ORDER, {"tasks": list(cell.tasks)})
    stream = in_order(stream, cell.tasks)
    model, processor = load()
    if cell.image_cache is not None:
        cache_images(model, cell.image_cache)
    collator = Collator(processor)
    asked = ask_with_shots(stream, model, collator, shots=cell.shots, by=cell.shots_by, form=cell.shots_as)
    book = ScoreBook(cell, stream, model, collator, asked=asked, progress=progress, team=team)
    if cell.base_row:
        book.score_base()
    with _looking(cell, model, team) as folder:
        if folder is not None:
            keep_attention_shift(model, collator, stream, row=0, arm=None, folder=folder, num_samples=cell.attention_shift)
    method = make_method(cell, model, collator)
    learning = Stream(tasks=(merge_tasks(stream),), base_tasks=stream.base_tasks) if cell.joint else stream
    rows = packing_collator(model, collator, learning.tasks[0].train, max_length=cell.pack) if cell.pack else collator
    trainer = Trainer(
        model,
        method,
        rows,
        settings=cell.settings,
        folder=cell.folder,
        trackers=cell.trackers,
        progress=progress,
        identity=cell.identity,
    )
    trainer.track(book.values(0))
    for learnt in trainer.learn(learning):
        book.keep_cost(learnt.cost.row())
        for arm in method.arms():
            book.score_row(learnt.index + 1, learnt.task.name, arm)
        trainer.track(book.values(learnt.index + 1))
    with _looking(cell, model, team) as folder:
        if folder is not None:
            row, arm = len(learning.tasks), method.arms()[0]
            keep_attention_shift(model, collator, stream, row=row, arm=arm, folder=folder, num_samples=cell.attention_shift)
            diagnose(method, model, collator, stream, folder=folder, num_examples=cell.examples)
            keep_load(model, collator, stream, arm, folder=folder)
    if team.is_main:
        write_json(cell.folder / DONE, {"finished": True, "seconds_of_this_process": round(time.time() - started, 1)})


@contextlib.contextmanager
def _looking(cell: Cell, model: nn.Module, team: Team) -> Iterator[Path | None]:
    """A block in which the model is looked at for the report; gives the folder to write to.

    That is the main process's work: None says that there is nothing to do here. A sharded model can be looked at by all
    processes together only; those that are not to write get a folder to throw away, with what decides what is done.
    """
    if team.is_main or not is_sharded(model):
        team.wait()
        yield cell.folder if team.is_main else None
    else:
        with tempfile.TemporaryDirectory() as throwaway:
            if (cell.folder / ATTENTION_SHIFT).exists():
                shutil.copy(cell.folder / ATTENTION_SHIFT, throwaway)
            team.wait()
            yield Path(throwaway)
    team.wait()


def make_method(cell: Cell, model: nn.Module, collator: Collator) -> Method:
    """The cell's method on `model`, with its additions; full training of a sparse decoder keeps its experts balanced.

    Raises:
        UserError: an unknown method or addition, a value that an option cannot have, or an addition that does not fit the method.
    """
    kind = METHODS[cell.method]
    read = {"tokenizer": collator.tokenizer} if "tokenizer" in signature(kind).parameters else {}
    method = kind(model, settings=cell.settings, **read, **cell.options)
    additions = cell.additions
    if isinstance(method, TRAIN_GATES) and is_sparse(model) and BALANCE not in [name for name, _ in additions]:
        additions = (*additions, (BALANCE, {}))  # with MM1's weights; one that the recipe names has the recipe's
    return compose(model, method, additions, collator=collator) if additions else method


def in_order(stream: Stream, names: Sequence[str]) -> Stream:
    """`stream` with its tasks in the order of `names`; as it is for no names."""
    tasks = {task.name: task for task in stream.tasks}
    return replace(stream, tasks=tuple(tasks[name] for name in names)) if names else stream


def limited(task: Task, *, train_size: int | None, test_size: int | None) -> Task:
    """`task` with at most so many samples, the first ones."""
    return replace(task, train=task.train[:train_size], test=task.test[:test_size])
