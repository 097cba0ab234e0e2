"""Arrow: route by each expert's own principal direction, without training."""

import torch
from jaxtyping import Float
from torch import Tensor

from alula.context import Context
from alula.experts.lora import LoRAExperts
from alula.routers.base import ROUTERS, Router, top_k_softmax


def principal_direction(down: Float[Tensor, "rank dim"], up: Float[Tensor, "out rank"]) -> Float[Tensor, " dim"]:
    """The top right singular vector of ``B A``, through the QR of ``B``: nothing of size out x dim is built."""
    small = torch.linalg.qr(up.float()).R @ down.float()
    return torch.linalg.svd(small, full_matrices=False).Vh[0]


@ROUTERS.register("arrow")
class ArrowRouter(Router):
    """Scores ``|u . p_z|`` with ``p_z`` the top right singular vector of ``B_z A_z``; softmax over the top-k.

    Source: Ostapenko et al. 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs" (arXiv 2405.11157).
    """

    prototypes: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.names: list[str] = []
        self.register_buffer("prototypes", torch.zeros(0, dim), persistent=False)

    def grow(self, name: str, experts: LoRAExperts) -> None:
        """Makes room; `refresh` fills it once the expert is trained."""
        self.names.append(name)
        self.prototypes = torch.cat([self.prototypes.to(experts.A[-1].device), experts.A[-1].new_zeros(1, self.dim)])

    def remove(self, name: str) -> None:
        """Forgets a prototype."""
        gone = self.names.index(name)
        self.prototypes = torch.cat([self.prototypes[:gone], self.prototypes[gone + 1 :]])
        self.names.pop(gone)

    @torch.no_grad()
    def refresh(self, experts: LoRAExperts) -> None:
        """Recomputes all prototypes from the experts' tensors."""
        rows = [principal_direction(down, up) for down, up in zip(experts.A, experts.B, strict=True)]
        self.prototypes = torch.stack(rows)

    def forward(self, x: Float[Tensor, "batch tokens dim"], context: Context) -> Float[Tensor, "batch tokens experts"]:
        """Weights over all experts (see the class)."""
        temperature = 1.0 if context.routing.temperature is None else context.routing.temperature
        scores = (x.float() @ self.prototypes.float().T).abs() * temperature
        if context.prior is not None:
            scores = scores + context.per_row(context.prior, x)
        return top_k_softmax(scores, top_k=context.routing.top_k)

    def stored(self, name: str) -> dict[str, Tensor]:
        """Nothing: prototypes follow from the experts."""
        return {}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Nothing to restore."""
