"""Low-rank experts of one linear layer, all in two matrix products. They know no router and no model."""

import math
import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from alula.context import BASE
from alula.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def check_name(name: str) -> str:
    """`name`, if it can name an expert.

    Raises:
        UserError: it has characters that a folder or a parameter cannot have, or is the base model's name.
    """
    if name == BASE:
        raise UserError(f"'{BASE}' is the name of the untouched model in every router. Choose another name for the expert.")
    if not _NAME.fullmatch(name):
        raise UserError(f"'{name}' cannot name an expert: letters, digits, '_' and '-' are accepted. Choose such a name.")
    return name


class LoRAExperts(nn.Module):
    """Low-rank updates of one linear layer, one per expert: ``sum_e weight_e * scale_e * B_e A_e x``.

    ``A`` is Kaiming-uniform, ``B`` zero, so an expert is silent at birth. All active experts are computed by one
    product with the stacked ``A`` and one with the stacked ``B``; the weight acts on the rank axis between them, so no
    expert's full-width output is ever built.

    Source: Hu et al. 2021, "LoRA", eq. 3 (arXiv 2106.09685).

    Example:
        >>> experts = LoRAExperts(in_features=4, out_features=6)
        >>> experts.grow("invoices", rank=2, alpha=4.0, dtype=torch.float32)
        >>> experts(torch.ones(1, 3, 4), torch.ones(1, 1, 1), active=(0,)).abs().max().item()
        0.0
    """

    def __init__(self, *, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.names: list[str] = []
        self.scales: list[float] = []
        self.A = nn.ParameterList()
        self.B = nn.ParameterList()

    def grow(
        self,
        name: str,
        *,
        rank: int,
        alpha: float,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Adds a silent expert; those that are there keep their tensors.

        Args:
            rank: width of the bottleneck, at least 1.
            alpha: the update is scaled by ``alpha / rank``.

        Raises:
            UserError: a rank below 1.
        """
        if rank < 1:
            raise UserError(f"Expert '{name}' was given rank {rank}; 1 or more is accepted. Choose a width such as 8.")
        down = torch.empty(rank, self.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        up = torch.zeros(self.out_features, rank)
        self.A.append(nn.Parameter(down.to(device=device, dtype=dtype)))
        self.B.append(nn.Parameter(up.to(device=device, dtype=dtype)))
        self.names.append(name)
        self.scales.append(alpha / rank)

    def remove(self, name: str) -> None:
        """Takes an expert out; the others keep their tensors."""
        gone = self.names.index(name)
        keep = [index for index in range(len(self.names)) if index != gone]
        self.A = nn.ParameterList([self.A[index] for index in keep])
        self.B = nn.ParameterList([self.B[index] for index in keep])
        self.names = [self.names[index] for index in keep]
        self.scales = [self.scales[index] for index in keep]

    def forward(
        self,
        x: Float[Tensor, "batch tokens in"],
        weights: Float[Tensor, "batch _ active"],
        *,
        active: Sequence[int],
    ) -> Float[Tensor, "batch tokens out"]:
        """The weighted sum of the active experts' updates.

        Args:
            weights: one per active expert, per token or (second axis of size 1) per sample.
            active: indices of the experts that are computed, in the order of `weights`.
        """
        down = torch.cat([self.A[index] for index in active]) if len(active) > 1 else self.A[active[0]]
        up = torch.cat([self.B[index] for index in active], dim=1) if len(active) > 1 else self.B[active[0]]
        hidden = functional.linear(x.to(down.dtype), down)
        return functional.linear(hidden * self._on_ranks(weights, active).to(hidden.dtype), up)

    def _on_ranks(self, weights: Tensor, active: Sequence[int]) -> Float[Tensor, "batch _ ranks"]:
        parts = [
            (weights[..., position : position + 1] * self.scales[index]).expand(*weights.shape[:-1], len(self.A[index]))
            for position, index in enumerate(active)
        ]
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    @torch.no_grad()
    def delta(self, name: str) -> Float[Tensor, "out in"]:
        """The dense update ``scale * B A`` of one expert, in fp32."""
        index = self.names.index(name)
        return self.scales[index] * (self.B[index].float() @ self.A[index].float())
