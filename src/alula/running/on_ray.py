"""Cells on a Ray cluster: each is a task there. Every machine must see the run folder, the data and the model under the same paths."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from alula.errors import UserError, install_extra
from alula.files import read_json
from alula.running.cell import CRASHED, Cell
from alula.running.cells import write_crash
from alula.running.worker import run_named


@contextlib.contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Ray, connected to the cluster at `address`; a connection that was there before is used and stays.

    Raises:
        UserError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError:
        raise UserError(f"--ray {address} came, but Ray is not installed. {install_extra('cluster')}") from None
    is_ours = not ray.is_initialized()
    if is_ours:
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:  # Ray's ConnectionError is an OSError
            raise UserError(
                f"No Ray cluster at '{address}': {error}. Give the address that 'ray start --head' printed, as in 10.0.0.1:6379."
            ) from error
    try:
        yield ray
    finally:
        if is_ours:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would try for minutes and then end this process."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()


class RayTasks:
    """A Ray task for each cell. One a machine, or one a GPU where there are any, unless told otherwise.

    Args:
        folder: the run folder, with its recipe.
        workers: cells at once in the whole cluster; None: as many as it has GPUs, else machines.
    """

    def __init__(self, ray: ModuleType, folder: Path, *, workers: int | None = None) -> None:
        self.ray, self.folder = ray, folder.resolve()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus, gpus = ([int(node.get(kind, 0)) for node in nodes] for kind in ("CPU", "GPU"))
        self.limit = workers or sum(gpus) or len(nodes)
        self.threads = max(1, min(sum(cpus) // self.limit, min((count for count in cpus if count), default=1)))
        share = min(1.0, sum(gpus) / self.limit)  # of a GPU, where cells have to share one
        # max_calls: a process for each cell, whose memory is given back
        self._task = ray.remote(num_cpus=self.threads, num_gpus=share, max_retries=0, max_calls=1)(run_there)
        self._running: dict[Any, Cell] = {}

    def start(self, cell: Cell) -> None:
        """See `Launcher`."""
        (cell.folder / CRASHED).unlink(missing_ok=True)
        place = str(Path.cwd())
        self._running[self._task.remote(str(self.folder), cell.name, threads=self.threads, place=place)] = cell

    def ended(self) -> list[tuple[Cell, str | None]]:
        """See `Launcher`."""
        over, _ = self.ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [(cell, self._outcome(cell, task)) for task, cell in ((task, self._running.pop(task)) for task in over)]

    def stop(self) -> None:
        """See `Launcher`."""
        for task in self._running:
            self.ray.cancel(task, force=True)
        self._running = {}

    def _outcome(self, cell: Cell, task: Any) -> str | None:
        try:
            self.ray.get(task)
        except self.ray.exceptions.RayError as error:  # the worker died, or never saw the folder
            write_crash(cell, f"Ray: {str(error).strip().splitlines()[-1]}", trace=str(error))
        if cell.is_done:
            return None
        return str(read_json(cell.folder / CRASHED)["error"])


def run_there(folder: str, name: str, *, threads: int, place: str) -> str | None:
    """Runs a cell on the machine that Ray chose, in the working directory of the one that asked."""
    with contextlib.chdir(place) if Path(place).is_dir() else contextlib.nullcontext():
        return run_named(Path(folder), name, threads=threads)
