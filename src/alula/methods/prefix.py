"""Prefix tuning: the model stays as it is, each layer sees a few learnt keys and values before its own."""

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks import general_prompts
from alula.methods.base import METHODS, Method, Stage
from alula.mixture.prefix import attach_prefixes
from alula.training.settings import TrainSettings

START = "start"


@METHODS.register("prefix")
class Prefix(Method):
    """One prefix that every task goes on training; the rest is frozen, nothing is kept of former tasks.

    Stages: before the first task ``start`` (some general text goes through the model once and gives the prefix its first
    values, no gradient); then ``train``.

    Not silent at birth, as an expert is: any keys take attention from the prompt. As first values the paper finds the
    activations of real words far better than random ones when data is scarce (sec. 7.4); ours are those of general text.
    Its other way, an MLP that gives the prefix and is thrown away, is not here. Differences: keys have no position, so
    the prompt's own positions stay, and the prefix is not cached.

    Args:
        num_virtual_tokens: learnt keys and values per layer (1 or more). Default 10: table-to-text in the paper.

    Source: Li & Liang 2021, "Prefix-Tuning", eq. 3 (arXiv 2101.00190).
    """

    def __init__(self, model: nn.Module, *, settings: TrainSettings, num_virtual_tokens: int = 10) -> None:
        super().__init__(model, settings=settings)
        self.prefixes = attach_prefixes(model, num_virtual_tokens=num_virtual_tokens)
        self._first = self._stage = ""

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Remembers which task is the first."""
        self._first = self._first or task.name

    def stages(self, task: Task) -> tuple[Stage, ...]:
        """First values before the first task, then training."""
        if task.name != self._first:
            return super().stages(task)
        # Every sample has a token at least, so these are enough.
        batches = -(-self.prefixes.num_virtual_tokens // self.settings.batch_size)
        return (Stage(name=START, steps=batches, learning_rate=0.0, gradient=False), *super().stages(task))

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Trains the prefix; from the first training on the model sees it."""
        self._stage = stage.name
        self.prefixes.train()
        if stage.gradient:
            self.prefixes.speak()

    def training_data(self, task: Task) -> Sequence[Sample]:
        """The task's samples; in the stage ``start`` general text that belongs to no task."""
        return general_prompts() if self._stage == START else task.train

    def observe(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        """Gives the prefix the activations of `batch`."""
        self.prefixes.fill(batch)

    @contextlib.contextmanager
    def base_model(self, model: nn.Module) -> Iterator[None]:
        """No prefix is seen."""
        before = {prefix: prefix.speaks for prefix in self.prefixes.sites.values()}
        for prefix in before:
            prefix.speaks = False
        try:
            yield
        finally:
            for prefix, speaks in before.items():
                prefix.speaks = speaks
