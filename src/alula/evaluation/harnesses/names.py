"""Names of tasks, before anything is loaded. It knows no harness."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from alula.errors import UserError, nearest


def check_names(tasks: Sequence[str], known: Iterable[str], *, harness: str, include_path: Path | None = None) -> None:
    """Refuses a task that the harness does not have; of its thousands only the nearest is named.

    Raises:
        UserError: an unknown task, or a folder of task files that is not there.
    """
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"{include_path} is no folder. Give --include-path the folder that holds the task files (.yaml).")
    names = set(known)
    for name in tasks:
        if name not in names:
            hint = nearest(name, names).partition("Did you mean")[1:]
            told = "".join(hint) or "Its list of tasks has the names; files of your own are read with --include-path."
            raise UserError(f"{harness} knows no task '{name}'. {told}")
