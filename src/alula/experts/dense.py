"""All experts at once: one product with the stacked A, the weights on the rank axis, one product with the stacked B.

The cheapest form for few or small experts: no token is moved, and nothing of size tokens x experts x width exists.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from alula.experts.chosen import Chosen

Shape3 = Float[Tensor, "batch tokens _"]


def dense_update(
    x: Float[Tensor, "batch tokens in"],
    weights: Float[Tensor, "batch _ slots"],
    index: Int[Tensor, "batch tokens slots"] | None = None,
    *,
    down: Sequence[Float[Tensor, "rank in"]],
    up: Sequence[Float[Tensor, "out rank"]],
    scales: Sequence[float],
    onto: Float[Tensor, "*tokens out"] | None,
    in_place: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``onto + sum over slots of weight * scale_e * B_e A_e x``, in the shape of `onto`.

    Kept for backward: x, the hidden state of the slots' ranks, weights and index. All else is made anew.

    Args:
        index: the expert in each slot, for experts of equal rank; None: slot i is expert i.
        onto: what the sum is added to; None is nothing.
        in_place: `onto` may be overwritten.
        dtype: what the products are computed in.
    """
    if torch.compiler.is_compiling():  # the compiler decides itself what to keep, and can look into plain operations only
        hidden = _hidden(x, torch.cat(list(down)), dtype)
        whole = Chosen(weights=weights, index=index, experts=len(down)).dense()
        on_ranks = _on_ranks(whole, scales, [len(a) for a in down]).to(dtype)
        return _add_product(onto, hidden * on_ranks, torch.cat(list(up), dim=1).to(dtype), in_place=False)
    return _Dense.apply(onto, x, weights, index, in_place, tuple(scales), dtype, *down, *up)


class _Dense(torch.autograd.Function):
    # `onto` comes first: where it is a view (the output of a linear layer with a bias is), torch takes the first gradient for its.
    @staticmethod
    def forward(
        ctx: Any, onto: Tensor | None, x: Tensor, weights: Tensor, index: Tensor | None, in_place: bool, scales: tuple[float, ...],
        dtype: torch.dtype, *pairs: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.scales, ctx.dtype, ctx.onto_dtype = scales, dtype, None if onto is None else onto.dtype
        down, up = pairs[: len(scales)], pairs[len(scales) :]
        hidden = _hidden(x, _joined(down), dtype)
        ctx.save_for_backward(x, weights, index, hidden if index is None else _slots_of(hidden, index, len(down)), *pairs)
        whole = Chosen(weights=weights, index=index, experts=len(down)).dense()
        on_ranks = _on_ranks(whole, scales, [len(a) for a in down]).to(dtype)
        out = _add_product(onto, hidden * on_ranks, _joined(up, dim=1).to(dtype), in_place=in_place)
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
        hidden = hidden if index is None else _into_all(hidden, index, count)
        whole = Chosen(weights=weights, index=index, experts=count).dense()
        on_ranks = _on_ranks(whole, scales, ranks).to(dtype)
        flat = grad.reshape(-1, grad.shape[-1]).to(dtype)
        from_up = (flat @ _joined(up, dim=1).to(dtype)).view_as(hidden)
        to_weights = _to_weights(from_up * hidden, whole, scales, ranks) if needed[2] else None
        if to_weights is not None and index is not None:
            to_weights = torch.nn.functional.pad(to_weights, (0, 1)).gather(-1, index)
        from_down = (from_up * on_ranks).flatten(0, 1)
        to_x = ((from_up * on_ranks) @ _joined(down).to(dtype)).to(x.dtype) if needed[1] else None
        rows = x.reshape(-1, x.shape[-1])
        to_down = _per_expert(from_down, rows, down, needed[7 : 7 + count], dtype)
        weighted = (hidden * on_ranks).flatten(0, 1) if any(needed[7 + count :]) else hidden
        to_up = _per_expert(weighted, flat, up, needed[7 + count :], dtype, transposed=True)
        to_onto = grad.to(ctx.onto_dtype) if needed[0] else None
        return to_onto, to_x, to_weights, None, None, None, None, *to_down, *to_up


def _places(index: Tensor, experts: int, rank: int) -> Tensor:
    """Where the slots' ranks lie; a slot of nobody points at the last expert, whose weight is elsewhere or zero."""
    return index.clamp(max=experts - 1).unsqueeze(-1).expand(*index.shape, rank)


def _slots_of(hidden: Shape3, index: Tensor, experts: int) -> Float[Tensor, "batch tokens slots rank"]:
    split = hidden.unflatten(-1, (experts, -1))
    return split.gather(2, _places(index, experts, split.shape[-1]))


def _into_all(slots: Float[Tensor, "batch tokens slots rank"], index: Tensor, experts: int) -> Shape3:
    batch, tokens, _, rank = slots.shape
    return slots.new_zeros(batch, tokens, experts, rank).scatter(2, _places(index, experts, rank), slots).flatten(2)


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def _hidden(x: Shape3, down: Tensor, dtype: torch.dtype) -> Shape3:
    return torch.nn.functional.linear(x.to(dtype), down.to(dtype))


def _on_ranks(weights: Shape3, scales: Sequence[float], ranks: Sequence[int]) -> Shape3:
    """Each expert's weight times its scale, once per rank."""
    scaled = weights * (scales[0] if len(set(scales)) == 1 else weights.new_tensor(scales))
    if len(ranks) == 1:
        return scaled
    if len(set(ranks)) == 1:
        return scaled.unsqueeze(-1).expand(*scaled.shape, ranks[0]).flatten(-2)
    return torch.cat([scaled[..., e : e + 1].expand(*scaled.shape[:-1], rank) for e, rank in enumerate(ranks)], dim=-1)


def _to_weights(products: Shape3, weights: Tensor, scales: Sequence[float], ranks: Sequence[int]) -> Tensor:
    """The weights' gradient: sums over each expert's ranks and, for weights of a sample, over its tokens."""
    if len(set(ranks)) == 1:
        summed = products.unflatten(-1, (-1, ranks[0])).sum(dim=-1)
    else:
        summed = torch.stack([part.sum(dim=-1) for part in products.split(list(ranks), dim=-1)], dim=-1)
    summed = summed.to(weights.dtype) * weights.new_tensor(scales)
    return summed.sum(dim=1, keepdim=True) if weights.shape[1] == 1 else summed


def _per_expert(
    ranked: Float[Tensor, "tokens ranks"],
    rows: Float[Tensor, "tokens width"],
    parameters: Sequence[Tensor],
    needed: Sequence[bool],
    dtype: torch.dtype,
    *,
    transposed: bool = False,
) -> list[Tensor | None]:
    """Gradients of the A (``ranked^T rows``) or, transposed, of the B; frozen experts cost nothing."""
    if not any(needed):
        return [None] * len(parameters)
    ranks = [p.shape[1] if transposed else p.shape[0] for p in parameters]
    rows = rows.to(dtype)

    def product(columns: Tensor) -> Tensor:
        return rows.T @ columns if transposed else columns.T @ rows

    if all(needed):
        parts = product(ranked).split(ranks, dim=1 if transposed else 0)
        return [part.to(p.dtype).contiguous() for part, p in zip(parts, parameters, strict=True)]
    columns = ranked.split(ranks, dim=1)
    return [product(c).to(p.dtype) if need else None for c, p, need in zip(columns, parameters, needed, strict=True)]


def _add_product(onto: Tensor | None, hidden: Shape3, up: Float[Tensor, "out ranks"], *, in_place: bool) -> Tensor:
    """``onto + hidden up^T``; `onto` itself where it could be overwritten."""
    if onto is None:
        return torch.nn.functional.linear(hidden, up)
    flat = hidden.flatten(0, 1)
    if onto.dtype != hidden.dtype:  # the sum over experts is rounded once
        return onto + (flat @ up.T).view_as(onto).to(onto.dtype)
    if in_place and onto.is_contiguous():
        onto.view(-1, onto.shape[-1]).addmm_(flat, up.T)
        return onto
    return torch.addmm(onto.reshape(-1, onto.shape[-1]), flat, up.T).view(onto.shape)
