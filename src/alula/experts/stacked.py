"""Few of many experts per token on a GPU: one grouped product over all sorted tokens, and no wait for the device.

The device never tells the processor how many tokens an expert got. On a CPU the loop of `grouped` is faster (docs/kernels.md).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def can_stack(x: Float[Tensor, "tokens in"], ranks: Sequence[int], width: int, *, dtype: torch.dtype) -> bool:
    """Whether `functional.grouped_mm` is there and takes these sizes: equal ranks, bf16, rows of a multiple of 16 bytes."""
    aligned = all(size * dtype.itemsize % 16 == 0 for size in (x.shape[1], width, ranks[0]))
    return hasattr(functional, "grouped_mm") and dtype == torch.bfloat16 and len(set(ranks)) == 1 and aligned


@torch.no_grad()
def in_one_piece(parameters: Sequence[Tensor]) -> Float[Tensor, "experts rows columns"]:
    """The parameters stacked. They move into the stack if they are not in one yet, so it never is a second copy.

    Raises:
        RuntimeError: parameters of different shapes.
    """
    first = parameters[0]
    size = first.numel()
    ends = first.untyped_storage().nbytes() // first.element_size() - first.storage_offset()
    step = size * first.element_size()
    together = first.is_contiguous() and ends >= size * len(parameters)
    if not (together and all(p.data_ptr() == first.data_ptr() + step * i and p.shape == first.shape for i, p in enumerate(parameters))):
        for parameter, row in zip(parameters, torch.stack([p.detach() for p in parameters]), strict=True):
            parameter.data = row
    return first.detach().as_strided((len(parameters), *first.shape), (size, *first.stride()))


def stacked_update(
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
    """What `grouped_update` gives, for sizes that `can_stack`; kept for backward: the same, too."""
    scaled = weights * torch.tensor([*scales, 0.0], dtype=weights.dtype, device=x.device)[index]
    said = _Stacked.apply(x, scaled, index, in_one_piece(down), in_one_piece(up), dtype, *down, *up)
    return onto + said.view(onto.shape).to(onto.dtype)


def _sorted(index: Int[Tensor, "tokens slots"], experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots in the order of experts, their tokens, the end of each expert's run, and which slots are nobody's."""
    flat, order = index.flatten().sort(stable=True)
    ends = torch.searchsorted(flat, torch.arange(experts, device=flat.device), right=True).to(torch.int32)
    return order, order.div(index.shape[1], rounding_mode="floor"), ends, (flat == experts).unsqueeze(1)


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, index: Tensor, down: Tensor, up: Tensor, dtype: torch.dtype, *pairs: Tensor
    ) -> Tensor:  # fmt: skip
        order, tokens, ends, nobody = _sorted(index, len(down))
        down, up = down.to(dtype), up.to(dtype)
        hidden = functional.grouped_mm(x[tokens].to(dtype), down.transpose(1, 2), offs=ends).masked_fill(nobody, 0)
        shares = weights.flatten()[order].unsqueeze(1).to(dtype)
        said = functional.grouped_mm(hidden * shares, up.transpose(1, 2), offs=ends).masked_fill(nobody, 0)
        ctx.save_for_backward(x, weights, index, hidden, *pairs)
        ctx.dtype = dtype
        return torch.zeros(len(x), up.shape[1], dtype=dtype, device=x.device).index_add_(0, tokens, said)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weights, index, hidden, *pairs = ctx.saved_tensors
        needed, dtype, count = ctx.needs_input_grad, ctx.dtype, len(pairs) // 2
        down, up = in_one_piece(pairs[:count]).to(dtype), in_one_piece(pairs[count:]).to(dtype)
        order, tokens, ends, nobody = _sorted(index, count)
        shares = weights.flatten()[order].unsqueeze(1).to(dtype)
        from_out = grad[tokens].to(dtype)
        from_up = functional.grouped_mm(from_out, up, offs=ends).masked_fill(nobody, 0)
        to_weights = torch.zeros_like(weights).flatten()
        to_weights[order] = (from_up * hidden).sum(dim=1).to(weights.dtype)
        from_down = from_up * shares
        to_x = None
        if needed[0]:
            rows = functional.grouped_mm(from_down, down, offs=ends).masked_fill(nobody, 0)
            to_x = torch.zeros(x.shape, dtype=dtype, device=x.device).index_add_(0, tokens, rows).to(x.dtype)
        grads: list[Tensor | None] = [None] * (2 * count)
        if any(needed[6 : 6 + count]):
            grads[:count] = functional.grouped_mm(from_down.T, x[tokens].to(dtype), offs=ends).unbind()
        if any(needed[6 + count :]):
            grads[count:] = functional.grouped_mm(from_out.T, hidden * shares, offs=ends).unbind()
        kept = [g.to(p.dtype) if g is not None and need else None for g, p, need in zip(grads, pairs, needed[6:], strict=True)]
        return to_x, to_weights.view_as(weights), None, None, None, None, *kept
