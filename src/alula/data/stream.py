"""What is learnt and in which order. It knows no model and no method."""

from collections.abc import Sequence
from dataclasses import dataclass

from alula.data.boxes import check_boxes
from alula.data.sample import Sample
from alula.errors import UserError

SCORINGS = ("exact_match", "ranked", "bits_per_byte", "box_iou")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One unit learnt in order (Lopez-Paz & Ranzato 2017).

    Attributes:
        scoring: ``exact_match`` of a greedy answer, ``ranked`` likelihood of the options, ``bits_per_byte`` of prose, or ``box_iou``:
            whether the box in a greedy answer overlaps the true one (an IoU of 0.5 or more).
        is_base: what the base model could do before the stream: evaluated, never trained.
        is_probe: a base task that no mean over base tasks counts, because it mixes skills (IIT).
        max_new_tokens: tokens; the longest answer that is generated.
        num_merged: how many tasks were put together into this one; it is trained for as many steps as they all.
    """

    name: str
    train: Sequence[Sample]
    test: Sequence[Sample]
    scoring: str = "exact_match"
    is_base: bool = False
    is_probe: bool = False
    max_new_tokens: int = 12
    description: str = ""
    num_merged: int = 1

    def __post_init__(self) -> None:
        if self.scoring not in SCORINGS:
            raise UserError(f"Task '{self.name}': unknown scoring '{self.scoring}'. Known: {', '.join(SCORINGS)}.")
        if self.scoring == "box_iou":
            check_boxes(self.test)

    @property
    def is_generated(self) -> bool:
        """Whether the model writes its answers, and is not given them to weigh."""
        return self.scoring in ("exact_match", "box_iou")


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The ordered tasks of a run and the base tasks that measure what is forgotten."""

    tasks: tuple[Task, ...]
    base_tasks: tuple[Task, ...] = ()

    def __post_init__(self) -> None:
        names = [task.name for task in (*self.tasks, *self.base_tasks)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"Task names come twice: {', '.join(twice)}. Each task needs a name of its own; rename one.")


def merge_tasks(stream: Stream) -> Task:
    """One task named ``joint`` with the data of all tasks of `stream`.

    Raises:
        UserError: the stream is empty.
    """
    if not stream.tasks:
        raise UserError("The stream has no tasks. Joint training wants one or more; add tasks to the recipe.")
    return Task(
        name="joint",
        train=[sample for task in stream.tasks for sample in task.train],
        test=[sample for task in stream.tasks for sample in task.test],
        max_new_tokens=max(task.max_new_tokens for task in stream.tasks),
        description="all at once: " + ", ".join(task.name for task in stream.tasks),
        num_merged=len(stream.tasks),
    )
