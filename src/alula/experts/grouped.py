"""Few of many experts per token: tokens are taken expert by expert, in tiles that stay in the processor's cache.

A product per expert and tile, in a loop. On a CPU this beats one grouped product over all sorted tokens, which writes every
token once per chosen expert at full width, twice and more (docs/kernels.md); only experts that somebody chose are touched.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 512
"""Tokens of one expert at a time: a tile and its product fit into a cache of about a megabyte at usual widths."""


class Tile(NamedTuple):
    """Some tokens of one expert.

    Attributes:
        hidden: where their hidden state lies in the flat tensor of all.
        slots: their places among all slots, ``token * slots + slot``.
        weights: their weights times the expert's scale.
    """

    expert: int
    hidden: slice
    tokens: Int[Tensor, " count"]
    slots: Int[Tensor, " count"]
    weights: Float[Tensor, "count 1"]


def tiles(
    weights: Float[Tensor, "tokens slots"], index: Int[Tensor, "tokens slots"], *, ranks: Sequence[int], scales: Sequence[float]
) -> Iterator[Tile]:
    """Every chosen expert's tokens, expert by expert; the slots of nobody (index ``len(ranks)``) are left out."""
    flat = index.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=len(ranks)).tolist()
    tokens, sorted_weights = order.div(index.shape[1], rounding_mode="floor"), weights.flatten()[order].unsqueeze(1)
    start = place = 0
    for expert, rank in enumerate(ranks):
        for first in range(start, start + counts[expert], TILE):
            here = slice(first, min(first + TILE, start + counts[expert]))
            size = (here.stop - here.start) * rank
            scaled = sorted_weights[here] if scales[expert] == 1.0 else sorted_weights[here] * scales[expert]
            yield Tile(expert, slice(place, place + size), tokens[here], order[here], scaled)
            place += size
        start += counts[expert]


def grouped_update(
    x: Float[Tensor, "tokens in"],
    weights: Float[Tensor, "tokens slots"],
    index: Int[Tensor, "tokens slots"],
    *,
    down: Sequence[Float[Tensor, "rank in"]],
    up: Sequence[Float[Tensor, "out rank"]],
    scales: Sequence[float],
    onto: Float[Tensor, "*tokens out"],
    in_place: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "*tokens out"]:
    """``onto + sum over slots of weight * scale_e * B_e A_e x``; see `dense_update` for the arguments.

    Kept for backward: x, the hidden state (``tokens x slots x rank``), weights and index. The order of tokens is made anew.
    """
    return _Grouped.apply(onto, x, weights, index, in_place, tuple(scales), dtype, *down, *up)


class _Grouped(torch.autograd.Function):
    # `onto` comes first: where it is a view (the output of a linear layer with a bias is), torch takes the first gradient for its.
    @staticmethod
    def forward(
        ctx: Any,
        onto: Tensor,
        x: Tensor,
        weights: Tensor,
        index: Tensor,
        in_place: bool,
        scales: tuple[float, ...],
        dtype: torch.dtype,
        *pairs: Tensor,
    ) -> Tensor:
        down, up = pairs[: len(scales)], pairs[len(scales) :]
        ranks = [len(a) for a in down]
        found = list(tiles(weights, index, ranks=ranks, scales=scales))
        hidden = x.new_empty(found[-1].hidden.stop if found else 0, dtype=dtype)
        out = onto if in_place and onto.is_contiguous() else onto.clone(memory_format=torch.contiguous_format)
        flat = out.view(-1, out.shape[-1])
        for tile in found:
            part = hidden[tile.hidden].view(-1, ranks[tile.expert])
            torch.mm(x.index_select(0, tile.tokens).to(dtype), down[tile.expert].to(dtype).T, out=part)
            said = (part * tile.weights.to(dtype)) @ up[tile.expert].to(dtype).T
            flat.index_add_(0, tile.tokens, said.to(out.dtype))
        ctx.save_for_backward(x, weights, index, hidden, *pairs)
        ctx.scales, ctx.dtype = scales, dtype
        if out is onto:
            ctx.mark_dirty(onto)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weights, index, hidden, *pairs = ctx.saved_tensors
        scales, dtype, needed = ctx.scales, ctx.dtype, ctx.needs_input_grad
        count = len(scales)
        down, up = pairs[:count], pairs[count:]
        ranks = [len(a) for a in down]
        grads: list[Tensor | None] = [None] * (2 * count)
        flat = grad.reshape(-1, grad.shape[-1])
        to_x = torch.zeros(x.shape, dtype=dtype, device=x.device) if needed[1] else None
        to_weights = torch.zeros(weights.numel(), dtype=weights.dtype, device=x.device) if needed[2] else None
        for tile in tiles(weights, index, ranks=ranks, scales=scales):
            e, part = tile.expert, hidden[tile.hidden].view(-1, ranks[tile.expert])
            from_out, scaled = flat.index_select(0, tile.tokens).to(dtype), tile.weights.to(dtype)
            from_up = from_out @ up[e].to(dtype)
            if to_weights is not None:
                to_weights[tile.slots] = (from_up * part).sum(dim=1).to(weights.dtype) * scales[e]
            from_down = from_up * scaled
            if to_x is not None:
                to_x.index_add_(0, tile.tokens, from_down @ down[e].to(dtype))
            if needed[7 + e]:
                grads[e] = _more(grads[e], from_down.T, x.index_select(0, tile.tokens).to(dtype))
            if needed[7 + count + e]:
                grads[count + e] = _more(grads[count + e], from_out.T, part * scaled)
        to_pairs = [None if g is None else g.to(p.dtype) for g, p in zip(grads, pairs, strict=True)]
        return (
            grad if needed[0] else None,
            None if to_x is None else to_x.to(x.dtype),
            None if to_weights is None else to_weights.view_as(weights),
            *(None, None, None, None),
            *to_pairs,
        )


def _more(sofar: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left @ right if sofar is None else sofar.addmm_(left, right)
