"""The dense router of MoELoRA: every expert speaks, by a softmax over one trained linear map."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alula.context import Context
from alula.experts.lora import LoRAExperts
from alula.routers.base import ROUTERS, Router, top_k_softmax


@ROUTERS.register("dense")
class DenseRouter(Router):
    """``softmax(G u)`` over all experts, with one row of ``G`` per expert; raw u, no bias, trained with the experts.

    With `Routing.top_k` below the number of experts the softmax is over the best ones alone.

    Source: Chen et al. 2024, "CoIN", MoELoRA (arXiv 2403.08350); scores in fp32 are ours.

    Example:
        >>> experts, router = LoRAExperts(in_features=4, out_features=6), DenseRouter(4)
        >>> for name in ("one", "two"):
        ...     experts.grow(name, rank=2, alpha=4.0, dtype=torch.float32)
        ...     router.grow(name, experts)
        >>> router.draw(generator=torch.Generator().manual_seed(0))
        >>> [tuple(row.shape) for row in router.gates]
        [(4,), (4,)]
    """

    needs_training = True

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.names: list[str] = []
        self.gates = nn.ParameterList()

    def grow(self, name: str, experts: LoRAExperts) -> None:
        """Adds a row of zeros beside the expert's tensors: experts with such rows speak equally, until `draw`."""
        self.gates.append(nn.Parameter(torch.zeros(self.dim, device=experts.A[-1].device)))
        self.names.append(name)

    def remove(self, name: str) -> None:
        """Forgets a row."""
        gone = self.names.index(name)
        self.gates = nn.ParameterList([gate for index, gate in enumerate(self.gates) if index != gone])
        self.names.pop(gone)

    @torch.no_grad()
    def draw(self, *, generator: torch.Generator) -> None:
        """Gives all rows the first values of a linear layer, as published: uniform within ``1 / sqrt(dim)``."""
        for gate in self.gates:
            drawn = torch.empty(self.dim).uniform_(-1 / math.sqrt(self.dim), 1 / math.sqrt(self.dim), generator=generator)
            gate.copy_(drawn)

    def forward(self, x: Float[Tensor, "batch tokens dim"], context: Context) -> Float[Tensor, "batch tokens experts"]:
        """Weights over all experts (see the class)."""
        routing = context.routing
        scores = x.float() @ torch.stack(list(self.gates)).float().T
        scores = scores * (1.0 if routing.temperature is None else routing.temperature)
        if context.prior is not None:
            scores = scores + context.per_row(context.prior, x)
        return scores.softmax(dim=-1) if routing.top_k >= len(self.names) else top_k_softmax(scores, top_k=routing.top_k)

    def stored(self, name: str) -> dict[str, Tensor]:
        """The expert's row; nothing of the base model, which is never chosen."""
        return {"gate": self.gates[self.names.index(name)].detach().clone()} if name in self.names else {}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Puts back what `stored` gave."""
        with torch.no_grad():
            self.gates[self.names.index(name)].copy_(tensors["gate"])
