"""What several verbs take in the same form."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alula.config import TaskChoice

FILES = (".jsonl", ".json", ".parquet")


def task_choice(text: str, **fields: Any) -> "TaskChoice":
    """``capital`` or ``invoices=invoices.jsonl`` as a task.

    Raises:
        UserError: a file without a name, a name without a file, or a bad value among `fields`.
    """
    from alula.config import check_task
    from alula.errors import UserError

    name, equals, path = text.partition("=")
    if not equals and (Path(text).suffix in FILES or "/" in text):
        stem = Path(text).stem if Path(text).suffix else Path(text).name
        raise UserError(f"--task {text} has no name. Give the task one: --task {stem}={text}")
    if not name or (equals and not path):
        raise UserError(f"--task {text} came; name=file.jsonl, or the name of a built-in task alone, is wanted (see `alula list`).")
    return check_task(name=name, path=Path(path) if path else None, **fields)


def quoted(folder: Path) -> str:
    """`folder` as it can be typed into a shell."""
    import shlex

    return shlex.quote(str(folder))
