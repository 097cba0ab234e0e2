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
    fits = onto.dtype is dtype and onto.is_contiguous()
    said = onto if fits and in_place else onto.clone() if fits else torch.zeros(onto.shape, dtype=dtype, device=onto.device)
    rows = said.view(-1, said.shape[-1])
    for token, out, experts, parts in zip(_to(x, dtype).unbind(), rows.unbind(), chosen, shares, strict=True):
        for expert, share in zip(experts, parts, strict=True):
            if share and expert < len(down):
                out.addmv_(_to(up[expert], dtype), torch.mv(_to(down[expert], dtype), token), alpha=share * scales[expert])
    return said if fits else onto + said.to(onto.dtype)


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a type, without the microsecond that asking torch for the type it has takes."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)
