"""The only seam into a backbone: a linear layer of a frozen model becomes host + experts + router.

No fork, no patched class: `attach` swaps named submodules through `nn.Module.set_submodule` and keeps their call
signature. What the mixtures need to know reaches them as one keyword that a pre-hook on the model adds to each call.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from alula.context import Cell, Context
from alula.errors import UserError
from alula.experts import Chosen, LoRAExperts
from alula.experts.choose import DECODE_SLOTS
from alula.mixture.decoding import plan
from alula.routers import Router, Seen

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears that take one input in most models. Where they do not, each computes its own: the tensor itself is compared."""


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
        self.together: tuple[Mixture, ...] = ()

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

    def _router(self, name: str) -> Router:
        return self.routers[name]  # type: ignore[return-value] # no other modules are put there

    def adopt(self, name: str, pair: Mapping[str, Tensor] | None, *, scale: float = 1.0) -> None:
        """Adds a frozen expert whose matrices are there already, and makes room for it in the routers.

        Matrices in the experts' type on the host's device are taken as they are, so those of a mapped file stay unread until they speak.

        Args:
            pair: ``A`` (rank x in) and ``B`` (out x rank); None is an expert of rank 1 that leaves this layer alone.
            scale: what ``B A`` is multiplied by.
        """
        dtype = self.weight.dtype if self.weight.dtype in (torch.float32, torch.float64) else torch.float32
        if pair is None:
            pair = {"A": torch.zeros(1, self.experts.in_features), "B": torch.zeros(self.experts.out_features, 1)}
        down, up = (pair[key].to(self.weight.device, dtype) for key in ("A", "B"))
        self.experts.adopt(name, down=down, up=up, scale=scale)
        for router in self.named_routers().values():
            router.grow(name, self.experts)

    def forward(self, x: Tensor) -> Tensor:
        """The host's output, and what the chosen experts add to it."""
        context = self.cell.context
        decoding = None if context is None else context.decoding
        if decoding is not None and not torch.compiler.is_compiling():
            known = decoding.plans.get(self) or plan(self, decoding)
            if known.dtype is x.dtype and x.numel() == x.shape[-1]:
                return known.say(x, self.cell)
        parts = self._modules  # a submodule's name is looked up in Python, a microsecond each, in every layer
        host, experts = cast(nn.Module, parts["host"]), cast(LoRAExperts, parts["experts"])
        out = host(x)
        if context is None:
            if not experts.names:
                return out
            raise UserError(
                f"{self.path} was called without a context, so its experts cannot be chosen. Call the model that "
                "`attach` was given, not a part of it, or `detach` first."
            )
        in_place = type(host) is nn.Linear and not host._forward_hooks  # others may keep the output; a plain one's is ours to add to
        told = None if decoding is None else decoding.told
        if told is not None and len(told) * len(context.active) <= DECODE_SLOTS and x.numel() == len(told) * x.shape[-1]:
            return experts.say(x, told, onto=out, in_place=in_place)
        tokens = x if x.dim() == 3 else x.view(*context.shape, x.shape[-1])
        if context.observer is not None:
            seen = context.valid if tokens.shape[:2] == context.shape else context.valid.new_ones(tokens.shape[:2])
            context.observer(self.path, self.block, tokens, seen)
        if not context.active:
            return out
        chosen = self._choose(x, tokens, context)
        if context.recorder is not None:
            context.recorder(self.path, chosen.dense().detach(), context.active)
        return experts(tokens, chosen, active=context.active, onto=out, in_place=in_place)

    def _choose(self, x: Tensor, tokens: Tensor, context: Context) -> Chosen:
        """Who speaks among the active experts: decided for the sample, or by a router for each token."""
        if context.weights is not None:
            return Chosen(weights=context.per_row(context.weights, tokens), experts=len(context.active))
        name = "gate" if context.gate_of is not None else context.routing.router
        assert name is not None, "a routing without a router brings its weights along"
        router, decided = self._router(name), self.cell.decided
        if not router.is_shared:
            chosen = router.choose(self._look(name, x, tokens), context)
        else:
            key = (self.block, *tokens.shape[:2])  # in cross-attention queries and keys are other tokens
            if key not in decided:
                decided[key] = router.choose(Seen(tokens), context)
            chosen = decided[key]
        if context.gate_of is not None:
            return Chosen(weights=chosen.weights, experts=1)
        if len(context.active) == chosen.experts:
            return chosen
        return Chosen(weights=chosen.dense()[..., list(context.active)], experts=len(context.active))

    def _look(self, name: str, x: Tensor, tokens: Tensor) -> Seen:
        """The hidden state for this linear's router, shared with those siblings that get the very same tensor."""
        if len(self.together) < 2:
            return Seen(tokens)
        key, mine = (self.block, name), len(self.together)
        source, seen, left = self.cell.decided.get(key, (None, None, 0))
        if source is not x:
            seen, left = Seen(tokens, together=[mixture._router(name) for mixture in self.together]), mine
        self.cell.decided[key] = (x, seen, left - 1)
        if left == 1:  # all have looked: nothing is held any longer
            del self.cell.decided[key]
        return seen


def introduce(mixtures: Iterable[Mixture]) -> None:
    """Tells the linears of a block that take one input from each other, so that their routers' products are one."""
    groups: dict[tuple[str, int, int], list[Mixture]] = {}
    for mixture in mixtures:
        last = mixture.path.rpartition(".")[2]
        kind = next((number for number, names in enumerate(TOGETHER) if last in names), None)
        if kind is not None:
            groups.setdefault((mixture.block, kind, mixture.experts.in_features), []).append(mixture)
    for group in groups.values():
        for mixture in group:
            mixture.together = tuple(group)


def own_parameters(mixtures: Iterable[Mixture]) -> Iterator[nn.Parameter]:
    """Those of experts and routers."""
    for mixture in mixtures:
        yield from mixture.experts.parameters()
        yield from mixture.routers.parameters()
