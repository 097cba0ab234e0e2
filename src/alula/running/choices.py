"""From what a recipe or a command line names to tasks with their samples."""

from alula.config import Recipe, TaskChoice
from alula.data.choices import read_choice
from alula.data.readers import check_images, read_test
from alula.data.stream import Stream, Task
from alula.data.tasks import load_task
from alula.running.cell import limited


def load_choice(choice: TaskChoice) -> Task:
    """The task a recipe names: built-in, or read from the user's file.

    Raises:
        UserError: an unknown built-in task, or data that cannot be used (with file and line), images included.
    """
    if choice.is_built_in:
        return load_task(choice.name, train_size=choice.train_size, test_size=choice.test_size)
    task = limited(read_choice(choice), train_size=choice.train_size, test_size=choice.test_size)
    check_images(task.train, task.test)  # now, not in the middle of the training
    return task


def load_to_score(choice: TaskChoice) -> Task:
    """As `load_choice`, but every row of a user's file is scored; a folder's test rows are.

    Raises:
        UserError: as `load_choice`.
    """
    if choice.path is None or choice.path.is_dir():
        return load_choice(choice)
    task = read_test(choice.name, choice.path, scoring=choice.scoring, **choice.reading)
    check_images(task.test)
    return task


def load_stream(recipe: Recipe) -> Stream:
    """The recipe's stream."""
    base = tuple(load_choice(choice) for choice in recipe.base_tasks)
    return Stream(tasks=tuple(load_choice(choice) for choice in recipe.tasks), base_tasks=base)
