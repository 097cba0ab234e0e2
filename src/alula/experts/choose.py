"""Which of the fast forms computes an update: chosen by sizes alone, never by a flag."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from alula.experts.chosen import Chosen
from alula.experts.decode import decode_update
from alula.experts.dense import dense_update
from alula.experts.grouped import grouped_update
from alula.experts.stacked import can_stack, stacked_update

DENSE_RANKS = 56
"""Stacked ranks per slot up to which computing every expert is cheaper than moving tokens (measured, docs/kernels.md)."""
DECODE_SLOTS = 8
"""Tokens times slots up to which matrix-vector products are cheaper than any stack."""
DECODE_MANY = 32
"""Tokens times slots up to which they are cheaper than sorting tokens: by five times and more (measured, docs/kernels.md)."""


def form_of(*, tokens: int, slots: int, ranks: Iterable[int], decodes: bool) -> str:
    """``decode``, ``dense`` or ``grouped``.

    Args:
        tokens: of all samples together.
        slots: experts that may speak at once for a token.
        ranks: of all experts that could be chosen.
        decodes: no gradient is wanted, and reading who was chosen is free (from a GPU it waits for all work before it).
    """
    if decodes and tokens * slots <= DECODE_SLOTS:
        return "decode"
    ranks = list(ranks)
    if slots >= len(ranks) or (len(set(ranks)) == 1 and sum(ranks) <= DENSE_RANKS * slots):
        return "dense"
    return "decode" if decodes and tokens * slots <= DECODE_MANY else "grouped"


def update(
    x: Float[Tensor, "batch tokens in"],
    chosen: Chosen,
    *,
    down: Sequence[Float[Tensor, "rank in"]],
    up: Sequence[Float[Tensor, "out rank"]],
    scales: Sequence[float],
    onto: Float[Tensor, "*tokens out"] | None = None,
    in_place: bool = False,
) -> Tensor:
    """``onto + sum over slots of weight * scale_e * B_e A_e x``, in the shape of `onto` (None: batch x tokens x out).

    Products are computed in the experts' type, or in autocast's.

    Args:
        down, up: the experts' A and B, of any ranks; read only where they are needed.
        in_place: `onto` may be overwritten.
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return _update(x, chosen, down, up, scales, onto, in_place, down[0].dtype)
    with torch.autocast(kind, enabled=False):
        return _update(x, chosen, down, up, scales, onto, in_place, torch.get_autocast_dtype(kind))


def _update(
    x: Tensor,
    chosen: Chosen,
    down: Sequence[Tensor],
    up: Sequence[Tensor],
    scales: Sequence[float],
    onto: Tensor | None,
    in_place: bool,
    dtype: torch.dtype,
) -> Tensor:
    chosen = _fewer_slots(chosen)
    tokens, slots, width = x.shape[0] * x.shape[1], chosen.slots, len(up[0])
    decodes = not torch.is_grad_enabled() and not x.is_cuda
    form = form_of(tokens=tokens, slots=slots, ranks=map(len, down), decodes=decodes)
    is_compiling = torch.compiler.is_compiling()
    if is_compiling and form == "grouped" and chosen.index is not None and tokens * slots > DECODE_MANY:
        return _outside_of_the_graph(x, chosen, down, up, scales, onto, dtype)
    if form == "dense" or (form == "grouped" and chosen.index is None) or is_compiling:
        if chosen.index is not None and len(set(map(len, down))) == 1:
            weights, index = _expanded(chosen.weights, x), _expanded(chosen.index, x)
        else:
            weights, index = chosen.dense(), None
        return dense_update(x, weights, index, down=down, up=up, scales=scales, onto=onto, in_place=in_place, dtype=dtype)
    rows, weights = x.reshape(tokens, x.shape[-1]), _expanded(chosen.weights, x).reshape(tokens, slots)
    index = None if chosen.index is None else _expanded(chosen.index, x).reshape(tokens, slots)
    if onto is None:
        onto, in_place = torch.zeros(*x.shape[:2], width, dtype=dtype, device=x.device), True
    if form == "decode":
        who = [range(slots)] * tokens if index is None else index.tolist()
        return decode_update(rows, weights.tolist(), who, down=down, up=up, scales=scales, onto=onto, in_place=in_place, dtype=dtype)
    assert index is not None
    one_product = x.is_cuda and can_stack(rows, list(map(len, down)), width, dtype=dtype)
    grouped = stacked_update if one_product else grouped_update
    return grouped(rows, weights, index, down=down, up=up, scales=scales, onto=onto, in_place=in_place, dtype=dtype)


@torch.compiler.disable
def _outside_of_the_graph(
    x: Tensor,
    chosen: Chosen,
    down: Sequence[Tensor],
    up: Sequence[Tensor],
    scales: Sequence[float],
    onto: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Sorting tokens by expert is no work for a compiler, and computing every expert of a large pool is work for nobody."""
    return _update(x, chosen, down, up, scales, onto, False, dtype)


def _fewer_slots(chosen: Chosen) -> Chosen:
    """Weights of samples that leave most experts out, as few slots: a batch may hold samples of many experts."""
    weights = chosen.weights
    if chosen.index is not None or chosen.experts == 1 or weights.shape[1] != 1 or weights.requires_grad or torch.compiler.is_compiling():
        return chosen
    slots = int(weights.count_nonzero(dim=-1).max()) if weights.numel() else 1
    if slots == chosen.experts:
        return chosen
    best, index = weights.topk(max(slots, 1), dim=-1)
    return Chosen(weights=best, index=index, experts=chosen.experts)


def _expanded(values: Float[Tensor, "batch _ slots"], x: Float[Tensor, "batch tokens in"]) -> Float[Tensor, "batch tokens slots"]:
    return values if values.shape[:2] == x.shape[:2] else values.expand(x.shape[0], x.shape[1], values.shape[-1])
