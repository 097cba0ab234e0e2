"""One cell in a process of its own: it gets the run folder and the cell's name, and reads everything else from there."""

import os
import sys
import threading
from pathlib import Path

import torch

from alula.config import read_recipe
from alula.errors import UserError
from alula.running.cell import run_cell
from alula.running.cells import RECIPE, attempt, find_cell
from alula.running.choices import load_chosen, load_stream


def run_named(folder: Path, name: str, *, threads: int) -> str | None:
    """Runs the cell of that name; gives what it crashed with, which is in the cell's folder too.

    Args:
        threads: of this process; they are set, and stay.

    Raises:
        UserError: the folder cannot be seen from here, or its recipe has no such cell.
    """
    if not (folder / RECIPE).exists():
        raise UserError(f"No {folder / RECIPE} here. Every machine must see the run folder under the same path: choose another --out.")
    torch.set_num_threads(threads)
    recipe = read_recipe(folder / RECIPE)
    cell = find_cell(recipe, folder, name)
    return attempt(cell, lambda: run_cell(cell, load_stream(recipe), lambda: load_chosen(recipe)))


def main() -> None:
    """Runs ``<folder> <cell> <threads>``; exits with 1 if the cell crashed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    folder, name, threads = sys.argv[1:4]
    sys.exit(0 if run_named(Path(folder), name, threads=int(threads)) is None else 1)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: two must never write one cell."""
    os.read(0, 1)  # the parent keeps this pipe open and never writes; not sys.stdin, whose lock would hang the exit
    os._exit(1)
