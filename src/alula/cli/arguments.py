"""What several verbs take in the same form."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from alula.config import TaskChoice


def names_data(text: str) -> bool:
    """Whether `text` is the path of data, not the name of a built-in task."""
    from alula.data.formats.table import endings

    return "/" in text or text.endswith(endings())


def name_for(path: str) -> str:
    """A task's name from the path of its data: ``shards/train-*.tar.gz`` is ``train``."""
    return re.sub(r"\W+", "-", Path(path).name.partition(".")[0]).strip("-") or "task"


def task_choice(text: str, **fields: Any) -> "TaskChoice":
    """``capital`` or ``invoices=invoices.jsonl`` as a task.

    Raises:
        UserError: a file without a name, a name without a file, or a bad value among `fields`.
    """
    from alula.config import check_task
    from alula.errors import UserError

    name, equals, path = text.partition("=")
    if not equals and names_data(text):
        raise UserError(f"--task {text} has no name. Give the task one: --task {name_for(text)}={text}")
    if not name or (equals and not path):
        raise UserError(f"--task {text} came; name=file.jsonl, or the name of a built-in task alone, is wanted (see `alula list`).")
    return check_task(name=name, path=Path(path) if path else None, **fields)


def refuse_given(context: typer.Context, *names: str, because: str) -> None:
    """An option that would change nothing is refused, so that nobody believes it did.

    Args:
        names: of parameters; those that were typed (or set in the environment) are named in the message.
        because: who does not use them: ``--harness``.

    Raises:
        UserError: one of them was given.
    """
    from alula.errors import UserError

    defaults = ("DEFAULT", "DEFAULT_MAP", None)
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [f"--{name.replace('_', '-')}" for name, source in sources.items() if getattr(source, "name", None) not in defaults]
    if given:
        raise UserError(f"{', '.join(given)} came, which {because} does not use. Leave {'it' if len(given) == 1 else 'them'} out.")


def quoted(folder: Path) -> str:
    """`folder` as it can be typed into a shell."""
    import shlex

    return shlex.quote(str(folder))
