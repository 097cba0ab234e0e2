"""Who speaks for one token, in plain numbers, for all linear layers that take the same input."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from alula.context import Routing
from alula.routers.base import scaled
from alula.routers.gate import GateRouter
from alula.routers.seen import joined_rows


class Teller:
    """What `GateRouter.choose` gives at level ``token`` without a null option, for several frozen routers in one go.

    The gates are read when it is made; whoever changes them makes another.

    Args:
        routers: over the same experts; their input is the same.
        routing: says how many experts speak, at what temperature.
    """

    def __init__(self, routers: Sequence[GateRouter], routing: Routing) -> None:
        self.rows, self.temperature = joined_rows(routers), routing.temperature
        self.shape = (len(routers), len(routers[0].names))
        self.top_k = min(routing.top_k, self.shape[1])
        masks = [router.untrained() for router in routers]
        nobody = self.rows.new_zeros(self.shape[1], dtype=torch.bool)
        known = [nobody if mask is None else mask for mask in masks]
        self.untrained = None if all(mask is None for mask in masks) else torch.stack(known)

    def tell(self, x: Float[Tensor, "*one dim"]) -> tuple[list[list[int]], list[list[float]]]:
        """For each router the experts chosen for this token, and their weights."""
        token = x.view(1, -1).float()
        products = torch.nn.functional.linear(token, self.rows).view(self.shape)
        if self.untrained is not None:
            products = products.masked_fill(self.untrained, -torch.inf)
        best, index = products.topk(self.top_k, dim=-1)
        spread = torch.native_layer_norm(token, token.shape[-1:], None, None, 1e-5)[2]
        return index.tolist(), scaled(best * spread, self.temperature).softmax(dim=-1).tolist()
