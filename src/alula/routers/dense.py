"""The dense router of MoELoRA: every expert speaks, by a softmax over one trained linear map."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alula.context import Context
from alula.experts import Chosen, LoRAExperts
from alula.experts.entries import entries
from alula.routers.base import ROUTERS, Router, prior_of, scaled
from alula.routers.seen import Kept, Seen


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
        self.gates = nn.ParameterList()
        self._kept: Kept[Tensor] = Kept()

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

    def choose(self, seen: Seen, context: Context) -> Chosen:
        """Weights of all experts, or of the best (see the class)."""
        routing, prior = context.routing, prior_of(context, seen.x)
        if routing.top_k < len(self.names):
            return self.best(seen, context, lambda products: scaled(products, routing.temperature))
        scores = scaled(seen.products(self), routing.temperature)
        return Chosen(weights=(scores if prior is None else scores + prior).softmax(dim=-1), experts=len(self.names))

    def rows(self) -> Float[Tensor, "experts dim"]:
        """The rows of G."""
        gates = entries(self.gates)
        return self._kept.of(gates, lambda: torch.stack(gates).float())

    def stored(self, name: str) -> dict[str, Tensor]:
        """The expert's row; nothing of the base model, which is never chosen."""
        return {"gate": self.gates[self.names.index(name)].detach().clone()} if name in self.names else {}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Puts back what `stored` gave."""
        with torch.no_grad():
            self.gates[self.names.index(name)].copy_(tensors["gate"])
