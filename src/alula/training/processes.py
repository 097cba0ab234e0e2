"""The processes that work on one run together, as torchrun or accelerate launch started them. It knows no model."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from alula.errors import UserError

T = TypeVar("T")
PATIENCE = 24 * 3600.0
"""Seconds that the others wait for what one process does alone."""
DOUBT = 120.0
"""Seconds that a process that failed waits to hear that all others failed as well."""


def join_launch() -> None:
    """Makes this process one of those its launcher started, by what the launcher put into the environment.

    The backend is that of the accelerators that are there, gloo without any.
    """
    PartialState(cpu=not torch.accelerator.is_available())


class Team:
    """The processes of this launch, for words and numbers; a process that no launcher started is a team of its own.

    All of them make it, and call its methods, in the same order. It has groups of its own, over gloo, so that waiting for
    what one process does alone is never taken for a broken connection.

    Attributes:
        index: this process, from 0; process 0 is the main one, which alone writes.
        count: how many there are.
    """

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        if distributed.is_available() and distributed.is_initialized():
            self.index, self.count = distributed.get_rank(), distributed.get_world_size()
        if self.count > 1:
            self._words = distributed.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE))
            self._ends = distributed.new_group(backend="gloo", timeout=timedelta(seconds=DOUBT))

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.index == 0

    def wait(self) -> None:
        """Returns when all processes came here."""
        if self.count > 1:
            distributed.barrier(group=self._words)

    def gather(self, value: T) -> list[T]:
        """Everybody's `value`, by process, for everybody."""
        return self._gather(value, self._words) if self.count > 1 else [value]

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives on the main process, for everybody; the others do not call it.

        Raises:
            UserError: whatever `make` raised, on all processes.
        """
        if self.count == 1:
            return make()
        said: list[tuple[T | None, UserError | None] | None] = [None]
        if self.is_main:
            try:
                said = [(make(), None)]
            except UserError as told:
                said = [(None, told)]
        distributed.broadcast_object_list(said, src=0, group=self._words)
        assert said[0] is not None
        value, refusal = said[0]
        if refusal is not None:
            raise refusal
        return value  # type: ignore[return-value]

    def agree(self, error: str | None) -> str | None:
        """What the first process failed with that did, or None; called when a cell ended on this process, well or not.

        Raises:
            RuntimeError: the others did not come in time: they hang in the middle of something that this process left.
        """
        errors = self._gather(error, self._ends) if self.count > 1 else [error]
        return next((said for said in errors if said is not None), None)

    def _gather(self, value: T, group: distributed.ProcessGroup) -> list[T]:
        found: list[T | None] = [None] * self.count
        distributed.all_gather_object(found, value, group=group)
        return found  # type: ignore[return-value]
