"""Neighbouring patches averaged, then one linear layer."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from alula.models.connectors.base import CONNECTORS, Connector, as_map, pooled_side


@CONNECTORS.register("average_pool")
class AveragePoolConnector(Connector):
    """The mean of each cell of an n x n partition of the patches, then one linear layer.

    Source: McKinzie et al., "MM1", section 3.2, average pooling with n = 8 or 12, https://arxiv.org/abs/2403.09611.

    Args:
        input_dim: width of the encoder's features.
        output_dim: width of the backbone.
        grid: rows and columns of the encoder's patches.
        num_tokens: n x n.

    Raises:
        UserError: `num_tokens` is no square, or n is larger than a side of the grid.

    Example:
        >>> import torch
        >>> AveragePoolConnector(6, 4, grid=(4, 6), num_tokens=4)(torch.zeros(2, 24, 6)).shape
        torch.Size([2, 4, 4])
    """

    def __init__(self, input_dim: int, output_dim: int, *, grid: tuple[int, int], num_tokens: int = 144) -> None:
        super().__init__()
        self.side = pooled_side(num_tokens, grid=grid, name="average_pool")
        self.num_tokens = num_tokens
        self.grid = grid
        self.projection = nn.Linear(input_dim, output_dim)

    def forward(self, features: Float[Tensor, "images patches features"]) -> Float[Tensor, "images tokens dim"]:
        """The projected means, row by row."""
        means = functional.adaptive_avg_pool2d(as_map(features, self.grid), self.side)
        return self.projection(means.flatten(2).transpose(1, 2))
