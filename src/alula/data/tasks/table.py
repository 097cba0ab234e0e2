"""The table of built-in tasks and what is known about each. It knows no task by name."""

from dataclasses import dataclass
from typing import Protocol

from alula.data.stream import Task
from alula.registry import Registry

LANGUAGES = ("en", "ja", "sw", "ur")
"""ISO 639-1 codes of the languages that multilingual tasks come in; the first is the one without a name suffix."""


class TaskBuilder(Protocol):
    """Makes a task from the assets in this package: the same task for the same arguments."""

    def __call__(self, *, train_size: int | None, test_size: int | None, seed: int) -> Task:
        """Args: sizes in samples (None = all), `seed` of the subsample and of everything drawn."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """What a reader of a score must know.

    Attributes:
        summary: what is asked, in one sentence.
        languages: ISO 639-1 codes of questions and answers.
        licence: of the data; the sources are in ``assets/NOTICE``.
        blind: test score (0-1) of the commonest training answer to each question, without looking; for ranked tasks
            chance; None where there is no such level (bits per byte).
        held_out: how the test split differs from the train split.
    """

    summary: str
    languages: tuple[str, ...]
    licence: str
    blind: float | None
    held_out: str

    def __str__(self) -> str:
        level = "" if self.blind is None else f" Blind level {self.blind:.2f}."
        return f"{self.summary} Languages: {', '.join(self.languages)}. Test: {self.held_out}.{level} {self.licence}."


TASKS: Registry[TaskBuilder] = Registry("task")
INFO: Registry[TaskInfo] = Registry("task description")
