"""Sequential fine-tuning of one low-rank update: the baseline that forgets."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from alula.context import OFF, Routing
from alula.data.stream import Stream, Task, merge_tasks
from alula.methods.base import METHODS, Method, Stage
from alula.mixture import Mixtures, attach
from alula.training.settings import TrainSettings

EXPERT = "shared"


class OneLoRA(Method):
    """One LoRA expert that every task goes on training; what differs is the stream it sees.

    Args:
        linears, layers: where the update sits (see `attach`).
        rank, alpha: its width and scale (see `Mixtures.grow`).
    """

    can_shard = True

    def __init__(
        self,
        model: nn.Module,
        *,
        settings: TrainSettings,
        rank: int = 8,
        alpha: float | None = None,
        linears: Sequence[str] | str | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, settings=settings)
        self.mixtures: Mixtures = attach(model, linears=linears, layers=layers, routers=())
        self.mixtures.grow(EXPERT, rank=rank, alpha=alpha, generator=torch.Generator().manual_seed(settings.seed))
        self.mixtures.routing = Routing(fixed={EXPERT: 1.0})

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Trains the shared expert."""
        self.mixtures.train_expert(EXPERT)

    def base_model(self, model: nn.Module) -> AbstractContextManager[None]:
        """No expert speaks."""
        return self.mixtures.using(OFF)


@METHODS.register("finetune")
class Finetune(OneLoRA):
    """One LoRA learns each task in turn, nothing kept of the former ones.

    Source: the lower baseline of every continual-learning paper; the LoRA is not merged between tasks, the optimizer is
    fresh for each.
    """


@METHODS.register("joint")
class Joint(OneLoRA):
    """All tasks at once, with as many steps as the tasks have in turn: what a stream can hope for.

    Source: "multi-task learning", compute-matched, as the comparison of arXiv 2511.01831 wants it.
    """

    def arrange(self, stream: Stream) -> Stream:
        """One task with everybody's data."""
        return Stream(tasks=(merge_tasks(stream),), base_tasks=stream.base_tasks)
