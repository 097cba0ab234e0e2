"""Several cells at once, each in a process of its own: one that is killed takes no other with it, and its memory is given back."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import psutil
import torch

from alula.config import Recipe
from alula.files import read_json, told_of
from alula.running.cell import CRASHED, Cell
from alula.running.cells import write_crash
from alula.running.choices import load_chosen

LOG = "worker.log"
TAIL = 30  # lines of the log that are kept of a worker that died
PAUSE = 0.2  # seconds between two looks at the running cells
# What a cell takes at most, in sizes of its model: weights, gradients, AdamW's two moments, and one more for activations.
MODEL_SIZES, OVERHEAD = 5, 2**30


class Launcher(Protocol):
    """Where cells run.

    Attributes:
        limit: cells at once.
    """

    limit: int

    def start(self, cell: Cell) -> None:
        """Starts a cell and does not wait for it."""

    def ended(self) -> list[tuple[Cell, str | None]]:
        """The cells that ended since the last call, with what they crashed with."""

    def stop(self) -> None:
        """Ends what still runs."""


def dispatch(cells: Sequence[Cell], launcher: Launcher, *, has_base: Callable[[], bool], say: Callable[[str], None] = print) -> int:
    """Runs all cells and gives the number that crashed.

    Args:
        has_base: whether row 0 is there; until it is, one cell runs alone and measures it for all.
    """
    waiting, num_running, crashed = list(cells), 0, 0
    try:
        while waiting or num_running:
            while waiting and num_running < (launcher.limit if has_base() else 1):
                cell = waiting.pop(0)
                say(f"{cell.name}: running")
                launcher.start(cell)
                num_running += 1
            for cell, error in launcher.ended():
                num_running -= 1
                crashed += error is not None
                say(f"{cell.name}: done" if error is None else f"{cell.name}: crashed: {error}")
            time.sleep(PAUSE)
    finally:
        launcher.stop()
    return crashed


class Processes:
    """A Python process for each cell.

    Args:
        folder: the run folder, with its recipe.
        workers: processes at once; they share the threads of this one.
    """

    def __init__(self, folder: Path, *, workers: int) -> None:
        self.folder, self.limit, self.threads = folder, workers, threads_each(workers)
        self._running: list[tuple[Cell, subprocess.Popen[bytes]]] = []

    def start(self, cell: Cell) -> None:
        """See `Launcher`."""
        # the search path goes along: a package that this process found by it must be the one the worker finds
        code = f"import sys; sys.path[:] = {sys.path!r}; from alula.running.worker import main; main()"
        command = [sys.executable, "-c", code, str(self.folder), cell.name, str(self.threads)]
        (cell.folder / CRASHED).unlink(missing_ok=True)
        with told_of(cell.folder / LOG):
            cell.folder.mkdir(parents=True, exist_ok=True)
            with open(cell.folder / LOG, "wb") as log:
                # a group of its own: Ctrl-C reaches this process alone, which then stops its workers
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, process_group=0)
        self._running.append((cell, process))

    def ended(self) -> list[tuple[Cell, str | None]]:
        """See `Launcher`."""
        over = [(cell, process) for cell, process in self._running if process.poll() is not None]
        self._running = [entry for entry in self._running if entry not in over]
        return [(cell, self._outcome(cell, process)) for cell, process in over]

    def stop(self) -> None:
        """See `Launcher`; what they saved is whole, and the same command goes on from there."""
        for _, process in self._running:
            process.terminate()
        for _, process in self._running:
            process.communicate()
        self._running = []

    def _outcome(self, cell: Cell, process: subprocess.Popen[bytes]) -> str | None:
        process.communicate()  # closes the pipe
        if cell.is_done:
            (cell.folder / LOG).unlink(missing_ok=True)
            return None
        if not (cell.folder / CRASHED).exists():  # it had no time to say why
            said = (cell.folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            write_crash(cell, _death(process.returncode, said), trace="\n".join(said[-TAIL:]))
        return str(read_json(cell.folder / CRASHED)["error"])


def _death(code: int, said: Sequence[str]) -> str:
    if code >= 0:
        last = f"It last said: {said[-1]}" if said else "It said nothing."
        return f"The process of this cell ended early with exit code {code}. {last}"
    name = signal.Signals(-code).name
    reason = " Most often the system does that when memory runs out: use fewer --workers." if name == "SIGKILL" else ""
    return f"The process of this cell was ended from outside ({name}).{reason}"


def affordable_workers(recipe: Recipe, *, most: int) -> int:
    """How many cells of `recipe` memory and cores allow at once, from 1 to `most`."""
    return max(1, min(most, num_cores(), free_memory() // (MODEL_SIZES * measure_model(recipe) + OVERHEAD)))


def measure_model(recipe: Recipe) -> int:
    """Bytes of the recipe's model in memory, as loaded."""
    model, _ = load_chosen(recipe, device="cpu")
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def free_memory() -> int:
    """Bytes: of the CUDA device that cells would use, if there is one; else of this machine."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else int(psutil.virtual_memory().available)


def num_cores() -> int:
    """Physical cores that this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def threads_each(workers: int) -> int:
    """Threads for each of so many processes: no more than this one would use, and together no more than there are cores."""
    return max(1, min(torch.get_num_threads(), num_cores() // workers))
