"""A few tokens without gradients: each reads its chosen experts' own A and B and nothing else of the pool."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def decode_update(
    x: Float[Tensor, "tokens in"],
    shares: Sequence[Sequence[float]],
    chosen: Sequence[Sequence[int]],
    *,
    down: Sequence[Float[Tensor, "rank in"]],
    up: Sequence[Float[Tensor, "out rank"]],
    scales: Sequence[float],
    onto: Float[Tensor, "*tokens out"],
    in_place: bool,
    dtype: torch.dtype,
) -> Float[Tensor, "*tokens out"]:
    """``onto + sum over slots of weight * scale_e * B_e A_e x``: two matrix-vector products per slot.

    See `dense_update` for the arguments.

    Args:
        shares: weights per token and slot, as plain numbers.
        chosen: the expert in each slot; one past the last is nobody.
    """
    if onto.dtype != dtype or not onto.is_contiguous():
        said = torch.zeros(onto.shape, dtype=dtype, device=onto.device)
    else:
        said = onto if in_place else onto.clone()
    rows, x = said.view(-1, said.shape[-1]), x.to(dtype)
    for row, (experts, parts) in enumerate(zip(chosen, shares, strict=True)):
        token, out = x[row], rows[row]
        for expert, share in zip(experts, parts, strict=True):
            if share and expert < len(down):
                out.addmv_(up[expert].to(dtype), down[expert].to(dtype) @ token, alpha=share * scales[expert])
    return said if onto.dtype == dtype and onto.is_contiguous() else onto + said.to(onto.dtype)
