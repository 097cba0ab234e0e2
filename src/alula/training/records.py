"""What the loop writes down: losses, costs, progress. It knows no model."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from alula.data.stream import Task
from alula.errors import UserError
from alula.files import told_of, write_text


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What learning one task took.

    Attributes:
        samples_seen: samples that went through the model, forward-only stages included.
        steps: optimizer steps.
        seconds: wall time of the loop, evaluation excluded, interruptions excluded.
        trainable_parameters: the largest number that trained at once.
        stored_parameters: what has to be kept after the task for all tasks so far.
        stored_bytes: the size of these tensors.
        optimizer_targets: tokens that were learnt from, repetitions included.
    """

    task: str
    samples_seen: int = 0
    steps: int = 0
    seconds: float = 0.0
    trainable_parameters: int = 0
    stored_parameters: int = 0
    stored_bytes: int = 0
    optimizer_targets: int = 0

    def row(self) -> dict:
        """One line of cost.jsonl."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TaskLearnt:
    """What `Trainer.learn` yields after each task.

    Attributes:
        index: the task's place in the stream, from 0.
        is_resumed: the task was finished by an earlier, interrupted run; what its evaluation wrote may be there already.
    """

    index: int
    task: Task
    cost: Cost
    is_resumed: bool = False


class LossLog:
    """losses.jsonl: one line per recorded step, cut back to the checkpoint on resumption.

    Args:
        path: None: nothing is written, rows are only counted.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.num_rows = 0

    def rewind(self, num_rows: int) -> None:
        """Keeps the first `num_rows` lines: later ones belong to steps that will be taken again.

        Raises:
            UserError: lines are missing.
        """
        self.num_rows = num_rows
        if self.path is None:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        if len(lines) < num_rows:
            raise UserError(
                f"{self.path} has {len(lines)} lines, the checkpoint beside it counts {num_rows}. "
                "Restore the file, or delete the checkpoint folder to start anew."
            )
        write_text(self.path, "".join(lines[:num_rows]))

    def append(self, row: dict) -> None:
        """Adds one line; it survives the end of the process at any later moment."""
        self.num_rows += 1
        if self.path is not None:
            with told_of(self.path), open(self.path, "a", encoding="utf-8") as out:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")


def progress_bar(*, console: Console | None = None) -> Progress:
    """A bar on stderr with steps, time used and time left, to be passed to `Trainer` inside a ``with`` block."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console or Console(stderr=True))


@contextlib.contextmanager
def progress_row(progress: Progress | None, label: str, *, start: int, steps: int) -> Iterator[Callable[[float | None], None]]:
    """A row of `progress` that stands at step `start` of `steps`; the block gets what to call, with the loss, after each step."""
    if progress is None:
        yield lambda loss: None
        return
    row = progress.add_task(label, total=steps, completed=start)
    yield lambda loss: progress.update(row, advance=1, description=label if loss is None else f"{label}: loss {loss:.3f}")
