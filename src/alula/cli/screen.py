"""What the verbs show on a terminal: progress and notes on stderr, results on stdout."""

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress

notes = Console(stderr=True, highlight=False)
results = Console(highlight=False)


def say(line: str) -> None:
    """A line for people, as it is."""
    notes.print(line, markup=False, soft_wrap=True)


@contextlib.contextmanager
def silent(is_silent: bool) -> Iterator[None]:
    """A block that shows nothing if `is_silent`: one of several processes speaks for all. Errors leave it and are shown."""
    consoles = (notes, results)
    for console in consoles:
        console.quiet = is_silent
    try:
        yield
    finally:
        for console in consoles:
            console.quiet = False


@contextlib.contextmanager
def progress() -> Iterator["Progress"]:
    """A progress bar with time left; the loop's notes appear above it."""
    from rich.logging import RichHandler

    from alula.training import progress_bar

    quiet_libraries()
    with progress_bar(console=notes) as bar:
        handler = RichHandler(console=bar.console, show_time=False, show_level=False, show_path=False)
        logging.getLogger("alula").addHandler(handler)
        logging.getLogger("alula").setLevel(logging.INFO)
        try:
            yield bar
        finally:
            logging.getLogger("alula").removeHandler(handler)


def quiet_libraries() -> None:
    """Transformers shows a bar of its own for each load; ours says more."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
