"""Rehearsal: some real samples of earlier tasks are learnt again with each new one."""

import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from alula.data.collate import Collator
from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.errors import UserError, nearest
from alula.methods.additions.base import ADDITIONS, Addition
from alula.methods.base import Method

PER_TASK, RESERVOIR = "per_task", "reservoir"


@ADDITIONS.register("rehearsal")
class Rehearsal(Addition):
    """Mixes a memory of the earlier tasks' training samples, text-only ones too, into the data of each stage that trains.

    Never a sample of a base task. What is in the memory follows from the stream and the seed, so nothing is stored: a
    resumed run finds the same samples. A stage that takes only some of its task's samples takes only such of the memory.

    Args:
        memory_size: samples in the whole memory (1 or more); None: `ratio` says.
        ratio: share (above 0, up to 1) of each earlier task that is kept, one sample at least; the memory grows with the
            tasks. None with `memory_size` None: 0.01, as in the paper.
        policy: how `memory_size` is shared. ``per_task``: equal parts, smaller with each task. ``reservoir``: every sample
            seen so far is in the memory with equal probability.

    Source: Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal"; ratio as in Srivastava et al. 2025
    (arXiv 2410.19925); reservoir sampling, Vitter 1985, algorithm R.

    Raises:
        UserError: both sizes, a value out of range, an unknown policy.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        *,
        collator: Collator,
        memory_size: int | None = None,
        ratio: float | None = None,
        policy: str = PER_TASK,
    ) -> None:
        super().__init__(method, model, collator=collator)
        if policy not in (PER_TASK, RESERVOIR):
            raise UserError(f"Unknown policy '{policy}'. {nearest(policy, (PER_TASK, RESERVOIR))}")
        if memory_size is not None and ratio is not None:
            raise UserError(f"memory_size: {memory_size} and ratio: {ratio} came; one of them is accepted. Take the other out.")
        if memory_size is None and policy == RESERVOIR:
            raise UserError("policy: reservoir came without memory_size, a number of samples from 1 up. Add it.")
        if memory_size is not None and memory_size < 1:
            raise UserError(f"memory_size: {memory_size} came; a number of samples from 1 up is accepted. Correct it.")
        if ratio is not None and not 0 < ratio <= 1:
            raise UserError(f"ratio: {ratio} came; a share above 0 and up to 1 is accepted. Correct it.")
        self.memory_size, self.policy = memory_size, policy
        self.ratio = 0.01 if ratio is None else float(ratio)
        self._tasks: tuple[Task, ...] = ()

    def arrange(self, stream: Stream) -> None:
        """Notes the tasks that are learnt, and their order."""
        self._tasks = stream.tasks

    def training_data(self, model: nn.Module, task: Task, samples: Sequence[Sample]) -> Sequence[Sample]:
        """`samples` and the memory."""
        kept = (replace(earlier, train=found) for earlier, found in self.memory(task))
        return [*samples, *(sample for earlier in kept for sample in self.method.training_data(earlier))]

    def memory(self, task: Task) -> list[tuple[Task, list[Sample]]]:
        """What is remembered of each earlier task while `task` is learnt."""
        names = [known.name for known in self._tasks]
        earlier = self._tasks[: names.index(task.name)] if task.name in names else ()
        if self.policy == RESERVOIR:
            return self._reservoir(earlier)
        drawn = []
        for position, known in enumerate(earlier):
            order = torch.randperm(len(known.train), generator=self._generator(known)).tolist()
            drawn.append((known, [known.train[index] for index in order[: self._share(known, position, len(earlier))]]))
        return drawn

    def _share(self, task: Task, position: int, num_tasks: int) -> int:
        if self.memory_size is None:
            return max(1, round(self.ratio * len(task.train)))
        return self.memory_size // num_tasks + (position < self.memory_size % num_tasks)

    def _reservoir(self, tasks: Sequence[Task]) -> list[tuple[Task, list[Sample]]]:
        """The n-th sample takes the place of one of the kept with probability memory_size / n."""
        assert self.memory_size is not None
        places: list[tuple[int, int]] = []
        seen = 0
        for number, task in enumerate(tasks):
            draws = torch.rand(len(task.train), generator=self._generator(task), dtype=torch.float64).tolist()
            for index, draw in enumerate(draws):
                seen += 1
                place = int(draw * seen)
                if len(places) < self.memory_size:
                    places.append((number, index))
                elif place < self.memory_size:
                    places[place] = (number, index)
        return [(task, [task.train[index] for owner, index in places if owner == number]) for number, task in enumerate(tasks)]

    def _generator(self, task: Task) -> torch.Generator:
        """Of the seed and the task's name: what is kept of a task does not depend on the tasks before it."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.method.settings.seed}/rehearsal/{task.name}".encode()))
