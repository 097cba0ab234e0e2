"""The learner of WINGS: low-rank attention from the hidden states to the features of one modality. It knows no model."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

BLOCKED = -3e4
"""Stands in `BIAS_COLUMNS` columns of a key that nobody may see; within the range of fp16."""
BIAS_COLUMNS = 8

Rotate = Callable[[Float[Tensor, "batch heads tokens head_dim"]], Float[Tensor, "batch heads tokens head_dim"]]


class LowRank(nn.Module):
    """``B A x``: A truncated normal with std 0.02, B zero."""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, dim))
        self.B = nn.Parameter(torch.zeros(dim, rank))
        nn.init.trunc_normal_(self.A, std=0.02)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The update of `x`, in the type of `x`."""
        return functional.linear(functional.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


class LoRRA(nn.Module):
    """Low-Rank Residual Attention, zero at birth::

        Q = h (1 + W_q)    K = x (1 + W_k)    V = x (1 + W_v)    each W = A B
        Learner(h, x) = softmax_heads(RoPE(Q) RoPE(K)^T / sqrt(d_h)) V W_o

    Args:
        dim: width of hidden states and features.
        head_dim: the host's head size, which its rotary embedding is made for. There are ``dim / head_dim`` heads; where
            that is no whole number the last head is filled up with zeros.
        rank: width of each low-rank map; 64 in the paper's scripts.

    A key that nobody may see carries a large negative bias in extra columns of the key, which meet ones in the query: so
    padding and other modalities need no mask, and kernels that know only ``is_causal`` stay in use at any length.

    Source: Zhang et al. 2024, "Wings", equation 4 (arXiv 2406.03496). Keys and values have full heads under grouped-query
    attention, as there.
    """

    def __init__(self, dim: int, *, head_dim: int, rank: int = 64) -> None:
        super().__init__()
        self.dim, self.head_dim = dim, head_dim
        self.q, self.k, self.v, self.o = (LowRank(dim, rank) for _ in range(4))

    def keys_values(
        self, x: Float[Tensor, "batch features dim"], *, valid: Bool[Tensor, "batch features"], rotate: Rotate
    ) -> tuple[Float[Tensor, "batch heads features wide"], Float[Tensor, "batch heads features head_dim"]]:
        """Keys, rotated and with their bias columns, and values: all that a generation must keep of the features."""
        keys = rotate(self._heads(x + self.k(x)))
        bias = torch.where(valid, 0.0, BLOCKED).to(keys.dtype)[:, None, :, None]
        return torch.cat([keys, bias.expand(*keys.shape[:-1], BIAS_COLUMNS)], dim=-1), self._heads(x + self.v(x))

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        keys: Float[Tensor, "batch heads features wide"],
        values: Float[Tensor, "batch heads features head_dim"],
        *,
        rotate: Rotate,
        causal: bool = False,
        mask: Bool[Tensor, "batch #heads tokens features"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """What the learner says to each token.

        Rows that may see no key at all get the mean of what is blocked: the caller takes them out.

        Args:
            causal: token i sees features 0 to i; there are as many features as tokens.
            mask: True where a token may see a feature, for cases that `causal` and the bias do not cover.
        """
        queries = rotate(self._heads(hidden + self.q(hidden)))
        queries = functional.pad(queries, (0, BIAS_COLUMNS), value=1.0)
        wide = functional.pad(values, (0, BIAS_COLUMNS))  # kernels want equal widths
        out = functional.scaled_dot_product_attention(queries, keys, wide, attn_mask=mask, is_causal=causal, scale=self.head_dim**-0.5)
        joined = out[..., : self.head_dim].transpose(1, 2).flatten(2)[..., : self.dim]
        return self.o(joined)

    def _heads(self, x: Tensor) -> Tensor:
        filled = functional.pad(x, (0, -self.dim % self.head_dim))
        return filled.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
