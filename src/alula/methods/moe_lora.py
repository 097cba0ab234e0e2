"""MoELoRA: a fixed set of small LoRA experts under a dense router, all of it trained on each task in turn."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from alula.context import OFF, Routing
from alula.data.stream import Task
from alula.errors import UserError
from alula.methods.base import METHODS, Method, Stage
from alula.mixture import Mixtures, attach
from alula.routers.dense import DenseRouter
from alula.training.settings import TrainSettings


@METHODS.register("moe_lora")
class MoELoRA(Method):
    """A mixture of LoRA experts in every linear layer, with a trained dense softmax router; each task goes on training it all.

    ``y = W u + alpha / rank * sum_e softmax(G u)_e B_e A_e u``, with ``num_experts`` experts that share the rank. Nothing is
    frozen between tasks and no loss balances the experts, so experts and router both drift: that is the baseline.

    Args:
        rank: of all experts together (a multiple of `num_experts`). Default 32: ours, for small models; 128 in the paper.
        alpha: the update is scaled by ``alpha / rank``; None is twice the rank, as published (256 for 128).
        num_experts: how many experts share the rank (1 or more). Default 8, as published.
        linears, layers: where they sit (see `attach`); None is every linear of the decoder, as published.

    Source: Chen et al. 2024, "CoIN" (NeurIPS 2024, arXiv 2403.08350), with the router's first values of the published
    code. Differences: A starts Kaiming-uniform as in every LoRA here (there normal with std 0.01), no dropout (0.05), and
    the connector is frozen (there it trains at 2e-5).

    Raises:
        UserError: experts that cannot share the rank equally.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        settings: TrainSettings,
        rank: int = 32,
        alpha: float | None = None,
        num_experts: int = 8,
        linears: Sequence[str] | str | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, settings=settings)
        if num_experts < 1 or rank < num_experts or rank % num_experts:
            raise UserError(
                f"rank: {rank} came with num_experts: {num_experts}; the rank must be a multiple of the number of experts, "
                "which is 1 or more. Choose such a pair, 32 and 8 for example."
            )
        self.mixtures: Mixtures = attach(model, linears=linears, layers=layers, routers=("dense",))
        generator = torch.Generator().manual_seed(settings.seed)
        # `grow` divides by the expert's own rank, the paper by the whole one.
        own_alpha = (2.0 * rank if alpha is None else alpha) / num_experts
        for index in range(num_experts):
            self.mixtures.grow(f"expert{index}", rank=rank // num_experts, alpha=own_alpha, generator=generator)
        for mixture in self.mixtures.sites.values():
            router = mixture.named_routers()["dense"]
            assert isinstance(router, DenseRouter)
            router.draw(generator=generator)
        self.mixtures.routing = Routing(router="dense", level="token", top_k=num_experts)

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Trains every expert and router."""
        self.mixtures.freeze()
        for mixture in self.mixtures.sites.values():
            mixture.experts.requires_grad_(True)
            mixture.routers.requires_grad_(True)

    def base_model(self, model: nn.Module) -> AbstractContextManager[None]:
        """No expert speaks."""
        return self.mixtures.using(OFF)
