"""Arrow: route by each expert's own principal direction, without training."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from alula.context import Context
from alula.experts import Chosen, LoRAExperts
from alula.routers.base import ROUTERS, Router, scaled
from alula.routers.seen import Seen


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
        self.register_buffer("prototypes", torch.zeros(0, dim), persistent=False)
        self._stale: tuple[LoRAExperts, ...] = ()  # in a tuple, so that the experts are not taken for a part of the router

    def grow(self, name: str, experts: LoRAExperts) -> None:
        """Makes room; `refresh` fills it once the expert is trained."""
        self.names.append(name)
        self.prototypes = self.prototypes.to(experts.A[-1].device)

    def remove(self, name: str) -> None:
        """Forgets a prototype."""
        gone = self.names.index(name)
        self.prototypes = torch.cat([self.prototypes[:gone], self.prototypes[gone + 1 :]])
        self.names.pop(gone)

    def refresh(self, experts: LoRAExperts) -> None:
        """Has all prototypes made anew from the experts' tensors when they are asked for: most pools are routed otherwise."""
        self._stale = (experts,)

    def choose(self, seen: Seen, context: Context) -> Chosen:
        """Weights of the best experts (see the class)."""
        temperature = context.routing.temperature
        return self.best(seen, context, lambda products: scaled(products.abs(), temperature), either_sign=True)

    def rows(self) -> Float[Tensor, "experts dim"]:
        """The prototypes; zeros for experts that were not there at the last `refresh`."""
        if self._stale:
            pairs = zip(self._stale[0].A, self._stale[0].B, strict=True)
            self.prototypes = torch.stack([principal_direction(down.detach(), up.detach()) for down, up in pairs])
            self._stale = ()
        missing = len(self.names) - len(self.prototypes)
        return functional.pad(self.prototypes, (0, 0, 0, missing)) if missing else self.prototypes

    def stored(self, name: str) -> dict[str, Tensor]:
        """Nothing: prototypes follow from the experts."""
        return {}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Nothing to restore."""
