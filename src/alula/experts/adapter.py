"""The language expert of MoME: a bottleneck beside a feed-forward network. It knows no model and no router."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class Adapter(nn.Module):
    """``scale * up(relu(down(x)))``, zero at birth: `up` starts at zero, `scale` at one, `down` as any linear layer.

    With the zeros in `scale` instead, a step from them would teach nothing but that one number.

    Args:
        dim: width of the network's input and output.
        bottleneck: width between the two maps; 64 as published.

    Source: Shen et al., "MoME", equation 8, https://arxiv.org/abs/2407.12709; the first values are ours.

    Example:
        >>> adapter = Adapter(8, bottleneck=2)
        >>> bool(adapter(torch.randn(1, 3, 8)).any())
        False
    """

    def __init__(self, dim: int, *, bottleneck: int = 64) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, bottleneck, bias=False), nn.Linear(bottleneck, dim, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """What is added to the network's output, in the adapter's own type."""
        return self.scale * self.up(functional.relu(self.down(x.to(self.scale.dtype))))
