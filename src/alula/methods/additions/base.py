"""What an addition is: something added to a continual-learning method, by verbs around the method's own. It knows no loop."""

from abc import ABC
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from alula.data.collate import Collator
from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.methods.base import Arm, Method, Stage
from alula.registry import Registry


class Addition(ABC):
    """A part of the loss, more data, a change of gradients, or an arm, for any method. Every verb is optional.

    The ``begin_`` verbs are called after the method's own, ``end_task`` before it. Where the data, the parts of the loss or
    the arms are handed on, each addition gets what the one before it gave, in the order of the recipe.

    Resumption is that of `Method`, with one difference: an addition makes no modules, so nothing is called for finished
    tasks. What it knows of them follows from the stream or is in ``state_dict``.

    Args:
        method: the method it is added to.
        model: looked at, not kept.
        collator: makes batches of samples, for what an addition does outside of the training steps.

    Attributes:
        reads_weights: it copies or takes derivatives by the values of what trains, so they must be whole on every process.
    """

    reads_weights: ClassVar[bool] = False

    def __init__(self, method: Method, model: nn.Module, *, collator: Collator) -> None:
        del model
        self.method = method
        self.collator = collator

    def arrange(self, stream: Stream) -> None:
        """Sees the stream as the method learns it, before everything else."""

    def begin_task(self, model: nn.Module, task: Task) -> None:
        """Prepares for `task`."""

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Sees what trains: parameters with ``requires_grad``."""

    def training_data(self, model: nn.Module, task: Task, samples: Sequence[Sample]) -> Sequence[Sample]:
        """What a stage with gradients draws from; not asked for others, whose statistics are of `task` alone."""
        return samples

    def parts(self, model: nn.Module, batch: dict[str, Tensor], logits: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parts of the loss, some replaced or added; each a mean over the targets of `batch`, or the same for any batch."""
        return parts

    def before_step(self, model: nn.Module) -> None:
        """May change the gradients, which are complete but not yet clipped."""

    def end_task(self, model: nn.Module, task: Task) -> None:
        """Stores what later tasks need, while the model is as the last step left it."""

    def arms(self, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        """The ways to use what was learnt."""
        return arms

    def state_dict(self) -> dict[str, Tensor]:
        """The addition's own tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` gave."""
        assert not state, f"{type(self).__name__} saves {sorted(state)} but has no load_state_dict()."


ADDITIONS: Registry[type[Addition]] = Registry("addition")
