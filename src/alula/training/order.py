"""Which samples a step sees, and its randomness: pure functions of seed, task, stage and step, so a resumed run needs only a counter."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from alula.data.ahead import made_ahead
from alula.data.sample import Sample

Batch = dict[str, Tensor]
Collate = Callable[[Sequence[Sample]], Batch]


def seed_of(*words: str | int) -> int:
    """A seed (63 bits) for what `words` name: the same words give the same seed on every machine."""
    digest = hashlib.sha256("\0".join(map(str, words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def reseed(seed: int, *, device: torch.device) -> None:
    """`torch.manual_seed` for what is drawn on `device`; that one also queues stack traces for accelerators that are not there: 4 ms."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextlib.contextmanager
def seeded(*words: str | int, device: torch.device) -> Iterator[None]:
    """A block in which torch's random numbers follow from `words`; the caller's generators are untouched by it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        reseed(seed_of(*words), device=device)
        yield


def sample_order(num_samples: int, *, seed: int, task: str, stage: str, epoch: int) -> list[int]:
    """The order of all samples in one epoch.

    Example:
        >>> first = sample_order(5, seed=0, task="shapes", stage="train", epoch=0)
        >>> sorted(first), first == sample_order(5, seed=0, task="shapes", stage="train", epoch=0)
        ([0, 1, 2, 3, 4], True)
    """
    generator = torch.Generator().manual_seed(seed_of(seed, task, stage, epoch))
    return torch.randperm(num_samples, generator=generator).tolist()


class Steps(Dataset[list[Batch]]):
    """Step number -> the micro-batches that this process computes in that step.

    Epochs follow each other without a gap: a batch may hold the end of one and the start of the next.

    Args:
        batch_size: samples per step, summed over all processes.
        micro_batch_size: samples per forward; None: all of this process's share.
        num_epochs: after so many epochs there are no samples left; None: never.
        process_index: this process takes every `num_processes`-th sample of a batch, starting here.
        is_never_empty: a process whose share is empty gets a sample without targets.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        collate: Collate,
        *,
        batch_size: int,
        micro_batch_size: int | None,
        seed: int,
        task: str,
        stage: str,
        num_epochs: int | None = None,
        process_index: int = 0,
        num_processes: int = 1,
        is_never_empty: bool = False,
    ) -> None:
        self.is_never_empty = is_never_empty
        self.samples = samples
        self.collate = collate
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size or batch_size
        self.num_epochs = num_epochs
        self.shard = slice(process_index, None, num_processes)
        self._order = functools.partial(sample_order, len(samples), seed=seed, task=task, stage=stage)
        self._known: tuple[int, list[int]] = (-1, [])

    def indices(self, step: int) -> list[int]:
        """The samples of `step` over all processes."""
        found = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, len(self.samples))
            if self.num_epochs is not None and epoch >= self.num_epochs:
                break
            found.append(self._order_in(epoch)[place])
        return found

    def _order_in(self, epoch: int) -> list[int]:
        """Two threads may ask at once: what one keeps must not be read as what the other asked for."""
        known = self._known
        if known[0] != epoch:
            known = self._known = (epoch, self._order(epoch=epoch))
        return known[1]

    def __getitem__(self, step: int) -> list[Batch]:
        """The micro-batches of `step`; none if the batch has fewer samples than there are processes."""
        found = self.indices(step)
        mine = [self.samples[index] for index in found[self.shard]]
        if not mine and self.is_never_empty:
            spare = self.collate([self.samples[found[0]]])
            return [{**spare, "labels": torch.full_like(spare["labels"], -100)}]
        size = self.micro_batch_size
        return [self.collate(mine[start : start + size]) for start in range(0, len(mine), size)]

    @contextlib.contextmanager
    def loader(self, steps: range, *, num_workers: int) -> Iterator[Iterator[list[Batch]]]:
        """A block in which the given steps come in order, prepared ahead by `num_workers` processes, or by a thread if that is 0."""
        if num_workers:
            # A generator of its own: by default a loader draws from torch's global one when it starts.
            yield iter(DataLoader(self, sampler=steps, batch_size=None, num_workers=num_workers, generator=torch.Generator()))
            return
        with contextlib.closing(made_ahead(self.__getitem__, steps)) as batches:
            yield batches
