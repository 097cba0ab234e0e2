"""Built-in tasks, real and offline: a new one is a file that registers a builder, and a line here. It knows no model."""

from alula.data.stream import Task
from alula.data.tasks import (  # noqa: F401 - imported for what they register
    animals,
    antonym,
    capital,
    captions,
    charts,
    definition,
    digits,
    easy_vqa,
    emoji,
    flags,
    iit,
    maps,
    prose,
    referring,
    scenes,
    words,
)
from alula.data.tasks.general_text import general_prompts
from alula.data.tasks.table import INFO, LANGUAGES, TASKS, TaskBuilder, TaskInfo
from alula.errors import UserError

__all__ = ["INFO", "LANGUAGES", "TASKS", "TaskBuilder", "TaskInfo", "describe", "general_prompts", "load_task"]


def load_task(name: str, *, train_size: int | None = None, test_size: int | None = None, seed: int = 0) -> Task:
    """The built-in task `name`; the same arguments give the same samples.

    Args:
        train_size: training samples; None takes all, and a larger number too.
        test_size: test samples; likewise.
        seed: of the choice of samples and of everything drawn.

    Raises:
        UserError: an unknown name, or a negative size.

    Example:
        >>> task = load_task("capital", test_size=5)
        >>> len(task.test), task.is_base
        (5, True)
    """
    for what, size in (("train_size", train_size), ("test_size", test_size)):
        if size is not None and size < 0:
            raise UserError(f"{what} is {size}. A number of samples from 0 up, or None for all, is wanted. Correct {what}.")
    return TASKS[name](train_size=train_size, test_size=test_size, seed=seed)


def describe() -> dict[str, TaskInfo]:
    """What is known of every built-in task, by name."""
    return {name: INFO[name] for name in INFO}
