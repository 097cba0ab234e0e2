"""One token of one answer: what a linear layer needs for it, looked up once an answer and not once a token.

Between two tokens the whole model passes through the processor's cache, so each Python object on the way to a matrix is a read from
memory; at narrow widths that is most of what an expert costs in decoding (docs/kernels.md).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from alula.context import Cell, Decoding
from alula.experts.choose import DECODE_SLOTS
from alula.experts.entries import entries
from alula.routers import GateRouter
from alula.routers.teller import Teller

if TYPE_CHECKING:
    from alula.mixture.mixture import Mixture


class Plan:
    """How a layer answers throughout a `Decoding`. This one: not in a way of its own, so `dtype` is that of no tensor."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def say(self, x: Tensor, cell: Cell) -> Tensor:
        """Host and experts on one token of any shape in the plan's type, without gradients."""
        raise NotImplementedError


class TellPlan(Plan):
    """``W x + b + share * B A x``: one expert, known beforehand."""

    __slots__ = ("bias", "down", "expert", "scales", "share", "up", "weight")

    def __init__(self, mixture: "Mixture", *, expert: int, share: float) -> None:
        super().__init__(mixture.weight.dtype)
        self.weight, self.bias = mixture.weight, mixture.bias
        self.down, self.up = mixture.experts.A[expert], mixture.experts.B[expert]
        self.expert, self.share, self.scales = expert, share, mixture.experts.scales

    def say(self, x: Tensor, cell: Cell) -> Tensor:
        """See `Plan`."""
        out = nn.functional.linear(x, self.weight, self.bias)
        out.view(-1).addmv_(self.up, torch.mv(self.down, x.view(-1)), alpha=self.share * self.scales[self.expert])
        return out


class GatePlan(Plan):
    """``W x + b + sum of share_e * B_e A_e x`` over the experts that the gates choose for this token.

    Linears that take the same input share a teller: the first to be computed asks it for all.
    """

    __slots__ = ("bias", "downs", "key", "place", "scales", "teller", "ups", "weight")

    def __init__(self, mixture: "Mixture", teller: Teller) -> None:
        super().__init__(mixture.weight.dtype)
        self.weight, self.bias, self.scales = mixture.weight, mixture.bias, mixture.experts.scales
        self.downs, self.ups = entries(mixture.experts.A), entries(mixture.experts.B)
        self.teller, self.place = teller, _together(mixture).index(mixture)
        self.key = (mixture.block, id(teller))

    def say(self, x: Tensor, cell: Cell) -> Tensor:
        """See `Plan`."""
        found = cell.decided.get(self.key)
        if found is None or found[0] is not x:
            found = cell.decided[self.key] = (x, *self.teller.tell(x))
        out, token = nn.functional.linear(x, self.weight, self.bias), x.view(-1)
        flat, downs, ups, scales = out.view(-1), self.downs, self.ups, self.scales
        for index, share in zip(found[1][self.place], found[2][self.place], strict=True):
            flat.addmv_(ups[index], torch.mv(downs[index], token), alpha=share * scales[index])
        return out


def plan(mixture: "Mixture", decoding: Decoding) -> Plan:
    """The layer's plan for these answers, which is kept with them."""
    made = decoding.plans[mixture] = _made(mixture, decoding)
    return made


def _made(mixture: "Mixture", decoding: Decoding) -> Plan:
    told, routing, experts = decoding.told, decoding.routing, mixture.experts
    if not _is_plain(mixture.host):
        return Plan()
    if told is not None:
        if len(told) != 1 or len(told[0]) != 1:
            return Plan()
        ((expert, share),) = told[0]
        fits = _of_one_type(mixture.weight, experts.A[expert], experts.B[expert])
        return TellPlan(mixture, expert=expert, share=share) if fits else Plan()
    fits = _of_one_type(mixture.weight, *entries(experts.A), *entries(experts.B))
    if not fits or routing.router != "gate" or routing.top_k > DECODE_SLOTS or mixture.weight.device.type != "cpu":
        return Plan()  # from a GPU, reading who was chosen would wait for all work before it, in each layer
    return GatePlan(mixture, _teller(mixture, decoding))


def _teller(mixture: "Mixture", decoding: Decoding) -> Teller:
    """A sibling's for these answers, if one has it already."""
    siblings = _together(mixture)
    for other in siblings:
        theirs = decoding.plans.get(other)
        if isinstance(theirs, GatePlan):
            return theirs.teller
    routers = [sibling.routers["gate"] for sibling in siblings]
    return Teller([router for router in routers if isinstance(router, GateRouter)], decoding.routing)


def _together(mixture: "Mixture") -> "Sequence[Mixture]":
    return mixture.together or (mixture,)


def _of_one_type(*tensors: Tensor) -> bool:
    """Whether they are parameters of the same type, and none a kind of tensor of its own: sharded, or quantised."""
    return all(type(tensor) is nn.Parameter and tensor.dtype is tensors[0].dtype for tensor in tensors)


def _is_plain(host: nn.Module) -> bool:
    """Whether calling `host` is its product and nothing else: nobody's hook, nobody's forward in place of its own."""
    hooks = host._forward_hooks or host._forward_pre_hooks or "forward" in vars(host)
    return type(host) is nn.Linear and not hooks and not nn.modules.module._has_any_global_hook()
