"""The mathematics, as it is written on paper: what every fast path is tested against. Nothing in the library runs it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def reference(
    x: Float[Tensor, "batch tokens in"],
    weights: Float[Tensor, "batch _ experts"],
    *,
    down: Sequence[Float[Tensor, "rank in"]],
    up: Sequence[Float[Tensor, "out rank"]],
    scales: Sequence[float],
) -> Float[Tensor, "batch tokens out"]:
    """``sum_e weight_e * scale_e * B_e A_e x``, one expert after the other; ``down`` are the A, ``up`` the B."""
    out = torch.zeros(*x.shape[:2], up[0].shape[0], dtype=x.dtype, device=x.device)
    for e in range(len(down)):
        out = out + weights[..., e : e + 1].to(x.dtype) * scales[e] * (x @ down[e].T @ up[e].T)
    return out
