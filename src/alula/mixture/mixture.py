"""The only seam into a backbone: a linear layer of a frozen model becomes host + experts + router.

No fork, no patched class: `attach` swaps named submodules through `nn.Module.set_submodule` and keeps their call
signature. What the mixtures need to know reaches them as one keyword that a pre-hook on the model adds to each call.
"""

from torch import Tensor, nn

from alula.context import Cell, Context
from alula.errors import UserError
from alula.experts.lora import LoRAExperts
from alula.routers.base import Router


class Mixture(nn.Module):
    """``host(x) + sum_e weight_e * expert_e(x)`` in place of one linear layer.

    Args:
        host: the frozen layer, plain or quantised.
        path: the host's name in the model.
        block: the name of the attention or MLP it belongs to; siblings of a block can share one router.
        cell: what the mixtures of this decoder layer share during a forward.

    Source: routing as in arXiv 2402.05859; that several routers can be laid on the same experts is ours.
    """

    def __init__(self, host: nn.Linear, *, path: str, block: str, cell: Cell) -> None:
        super().__init__()
        self.host = host
        self.experts = LoRAExperts(in_features=host.in_features, out_features=host.out_features)
        self.routers = nn.ModuleDict()
        self.path, self.block, self.cell = path, block, cell

    @property
    def weight(self) -> Tensor:
        """The host's weight, for code that looks at a linear layer's dtype or device."""
        return self.host.weight

    @property
    def bias(self) -> Tensor | None:
        """The host's bias."""
        return self.host.bias

    def named_routers(self) -> dict[str, Router]:
        """The routers laid on these experts, by their registered names."""
        return {name: router for name, router in self.routers.items() if isinstance(router, Router)}

    def forward(self, x: Tensor) -> Tensor:
        """The host's output, and what the chosen experts add to it."""
        out = self.host(x)
        context = self.cell.context
        if context is None:
            if not self.experts.names:
                return out
            raise UserError(
                f"{self.path} was called without a context, so its experts cannot be chosen. Call the model that "
                "`attach` was given, not a part of it, or `detach` first."
            )
        tokens = x if x.dim() == 3 else x.view(*context.shape, x.shape[-1])
        if context.observer is not None:
            seen = context.valid if tokens.shape[:2] == context.shape else context.valid.new_ones(tokens.shape[:2])
            context.observer(self.path, self.block, tokens, seen)
        if not context.active:
            return out
        weights = self.weights(tokens, context)
        if context.recorder is not None:
            context.recorder(self.path, weights.detach(), context.active)
        return out + self.experts(tokens, weights, active=context.active).view_as(out).to(out.dtype)

    def weights(self, x: Tensor, context: Context) -> Tensor:
        """Weights over the active experts: of the sample if they were decided for it, else of each token."""
        if context.weights is not None:
            return context.per_row(context.weights, x)
        name = "gate" if context.gate_of is not None else context.routing.router
        assert name is not None, "a routing without a router brings its weights along"
        router = self.named_routers()[name]
        if not router.is_shared:
            decided = router(x, context)
        else:
            key = (self.block, *x.shape[:2])  # in cross-attention queries and keys are other tokens
            if key not in self.cell.decided:
                self.cell.decided[key] = router(x, context)
            decided = self.cell.decided[key]
        return decided[..., list(context.active)] if len(context.active) < decided.shape[-1] else decided
