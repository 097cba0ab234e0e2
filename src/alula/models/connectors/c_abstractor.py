"""Convolutions around a pooling: fewer tokens that still know their neighbourhood."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from alula.models.connectors.base import CONNECTORS, Connector, as_map, pooled_side


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def forward(self, input: Float[Tensor, "images channels rows columns"]) -> Float[Tensor, "images channels rows columns"]:
        """The normalised map."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CAbstractorBlock(nn.Module):
    """A RegNet bottleneck: 1 x 1, 3 x 3 depthwise, squeeze-and-excitation, 1 x 1, and a shortcut.

    Args:
        squeeze_ratio: width of the squeeze, as a share of the *input* channels.
    """

    def __init__(self, input_dim: int, output_dim: int, *, squeeze_ratio: float = 0.25) -> None:
        super().__init__()
        squeezed = round(input_dim * squeeze_ratio)
        self.widen, self.widen_norm = nn.Conv2d(input_dim, output_dim, 1, bias=False), ChannelLayerNorm(output_dim)
        self.depthwise = nn.Conv2d(output_dim, output_dim, 3, padding=1, groups=output_dim, bias=False)
        self.depthwise_norm = ChannelLayerNorm(output_dim)
        self.squeeze, self.excite = nn.Conv2d(output_dim, squeezed, 1), nn.Conv2d(squeezed, output_dim, 1)
        self.project, self.project_norm = nn.Conv2d(output_dim, output_dim, 1, bias=False), ChannelLayerNorm(output_dim)
        self.shortcut: nn.Module = nn.Identity()
        if input_dim != output_dim:
            self.shortcut = nn.Sequential(nn.Conv2d(input_dim, output_dim, 1, bias=False), ChannelLayerNorm(output_dim))

    def forward(self, maps: Float[Tensor, "images channels rows columns"]) -> Float[Tensor, "images out rows columns"]:
        """The block's output map."""
        hidden = functional.silu(self.widen_norm(self.widen(maps)))
        hidden = functional.silu(self.depthwise_norm(self.depthwise(hidden)))
        hidden = hidden * self.excite(functional.silu(self.squeeze(hidden.mean((2, 3), keepdim=True)))).sigmoid()
        return functional.silu(self.project_norm(self.project(hidden)) + self.shortcut(maps))


@CONNECTORS.register("c_abstractor")
class CAbstractorConnector(Connector):
    """Learnt positions, a stage of blocks, an average pooling to a square, a second stage, two linear layers with SiLU between.

    Source: Cha et al., "Honeybee: Locality-enhanced Projector for Multimodal LLM", section 4.2, https://arxiv.org/abs/2312.06742;
    MM1's connector, https://arxiv.org/abs/2403.09611. Unlike the published code, the grid of patches is given, not guessed as the
    root of their number: it need not be a square.

    Args:
        input_dim: width of the encoder's features.
        output_dim: width of the backbone.
        grid: rows and columns of the encoder's patches.
        num_tokens: a square.
        hidden_dim: channels of both stages.
        depth: blocks in a stage.

    Raises:
        UserError: `num_tokens` is no square, or its side is larger than one of the grid's.

    Example:
        >>> import torch
        >>> CAbstractorConnector(8, 4, grid=(4, 6), num_tokens=9, hidden_dim=8)(torch.zeros(2, 24, 8)).shape
        torch.Size([2, 9, 4])
    """

    def __init__(
        self, input_dim: int, output_dim: int, *, grid: tuple[int, int], num_tokens: int = 144, hidden_dim: int = 1024, depth: int = 3
    ) -> None:
        super().__init__()
        self.side = pooled_side(num_tokens, grid=grid, name="c_abstractor")
        self.num_tokens = num_tokens
        self.grid = grid
        self.positions = nn.Parameter(torch.empty(grid[0] * grid[1], input_dim))
        self.before = _stage(input_dim, hidden_dim, depth=depth)
        self.after = _stage(hidden_dim, hidden_dim, depth=depth)
        self.inner = nn.Linear(hidden_dim, output_dim)
        self.outer = nn.Linear(output_dim, output_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Positions from a truncated normal of 0.02."""
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, features: Float[Tensor, "images patches features"]) -> Float[Tensor, "images tokens dim"]:
        """The tokens, row by row."""
        maps = self.before(as_map(features + self.positions, self.grid))
        maps = self.after(functional.adaptive_avg_pool2d(maps, self.side))
        return self.outer(functional.silu(self.inner(maps.flatten(2).transpose(1, 2))))


def _stage(input_dim: int, output_dim: int, *, depth: int) -> nn.Sequential:
    return nn.Sequential(*(CAbstractorBlock(input_dim if index == 0 else output_dim, output_dim) for index in range(depth)))
