"""Low-rank experts of one linear layer: their tensors and their sum. They know no router and no model."""

import math
import re
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alula.context import BASE
from alula.errors import UserError
from alula.experts.choose import update
from alula.experts.chosen import Chosen
from alula.experts.decode import decode_update
from alula.experts.entries import entries

_Parameters = dict[str, nn.Parameter]
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

    ``A`` is Kaiming-uniform, ``B`` zero, so an expert is silent at birth. `alula.experts.choose` picks the form of the
    computation by its sizes; no form ever builds the output of every expert for every token.

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

    def adopt(self, name: str, *, down: Float[Tensor, "rank in"], up: Float[Tensor, "out rank"], scale: float) -> None:
        """Adds a frozen expert whose tensors are there already; neither is read or copied.

        Args:
            scale: what ``B A`` is multiplied by.
        """
        self.A.append(nn.Parameter(down, requires_grad=False))
        self.B.append(nn.Parameter(up, requires_grad=False))
        self.names.append(name)
        self.scales.append(scale)

    def forward(
        self,
        x: Float[Tensor, "batch tokens in"],
        weights: Float[Tensor, "batch _ active"] | Chosen,
        *,
        active: Sequence[int],
        onto: Float[Tensor, "*tokens out"] | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """The weighted sum of the active experts' updates, and `onto`.

        Args:
            weights: one per active expert, per token or (second axis of size 1) per sample; or who was chosen among them.
            active: indices of the experts that may speak, in the order of `weights`.
            onto: what the sum is added to, and whose shape and type the result has; None: batch x tokens x out, in the experts' type.
            in_place: `onto` may be overwritten.
        """
        chosen = weights if isinstance(weights, Chosen) else Chosen(weights=weights, experts=len(active))
        down, up, scales = self._of(active)
        return update(x, chosen, down=down, up=up, scales=scales, onto=onto, in_place=in_place)

    def say(
        self,
        x: Float[Tensor, "*tokens in"],
        told: Sequence[Sequence[tuple[int, float]]],
        *,
        onto: Float[Tensor, "*tokens out"],
        in_place: bool,
    ) -> Tensor:
        """What `forward` gives for one token per sample where who speaks is known as plain numbers; without gradients.

        Nothing but the products is done here, and of the experts that speak alone: at narrow widths a token's time is mostly Python's.

        Args:
            told: per sample, experts and their weights.
        """
        down, up = cast(nn.ParameterList, self._modules["A"]), cast(nn.ParameterList, self._modules["B"])
        A, B, scales = cast(_Parameters, down._parameters), cast(_Parameters, up._parameters), self.scales
        dtype = A["0"].dtype
        if not in_place or x.dtype is not dtype or onto.dtype is not dtype or not onto.is_contiguous():
            who, shares = [[index for index, _ in pairs] for pairs in told], [[share for _, share in pairs] for pairs in told]
            rows = x.reshape(len(told), -1)
            return decode_update(
                rows, shares, who, down=entries(down), up=entries(up), scales=scales, onto=onto, in_place=in_place, dtype=dtype
            )
        alone = len(told) == 1
        tokens, outs = ((x.view(-1),), (onto.view(-1),)) if alone else (x.reshape(len(told), -1), onto.view(len(told), -1))
        for token, out, pairs in zip(tokens, outs, told, strict=True):
            for index, share in pairs:
                key = str(index)
                out.addmv_(B[key], torch.mv(A[key], token), alpha=share * scales[index])
        return onto

    def _of(self, active: Sequence[int]) -> tuple[list[Tensor], list[Tensor], list[float]]:
        down, up = entries(self.A), entries(self.B)
        if len(active) == len(down) and list(active) == list(range(len(down))):
            return down, up, self.scales
        return [down[i] for i in active], [up[i] for i in active], [self.scales[i] for i in active]

    @torch.no_grad()
    def delta(self, name: str) -> Float[Tensor, "out in"]:
        """The dense update ``scale * B A`` of one expert, in fp32."""
        index = self.names.index(name)
        return self.scales[index] * (self.B[index].float() @ self.A[index].float())
