"""Learnt queries that read the patches."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alula.models.connectors.attention import QueryAttention
from alula.models.connectors.base import CONNECTORS, Connector


@CONNECTORS.register("attention_pool")
class AttentionPoolConnector(Connector):
    """`num_tokens` learnt queries cross-attend to the patches; what they read goes through one linear layer.

    Source: McKinzie et al., "MM1", section 3.2, attention pooling with 64 or 144 queries, https://arxiv.org/abs/2403.09611. It gives
    no more than this; ours are the LayerNorm on the features and a learnt position for each patch in the keys, because convolutional
    features do not say where they are.

    Args:
        input_dim: width of the encoder's features and of the queries.
        output_dim: width of the backbone.
        grid: rows and columns of the encoder's patches.
        num_tokens: queries; any number.
        num_heads: a divisor of `input_dim`.

    Raises:
        UserError: `input_dim` is no multiple of `num_heads`.

    Example:
        >>> import torch
        >>> AttentionPoolConnector(8, 4, grid=(4, 6), num_tokens=5)(torch.zeros(2, 24, 8)).shape
        torch.Size([2, 5, 4])
    """

    def __init__(self, input_dim: int, output_dim: int, *, grid: tuple[int, int], num_tokens: int = 144, num_heads: int = 8) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.queries = nn.Parameter(torch.empty(num_tokens, input_dim))
        self.positions = nn.Parameter(torch.empty(grid[0] * grid[1], input_dim))
        self.norm = nn.LayerNorm(input_dim)
        self.attention = QueryAttention(input_dim, num_heads=num_heads, name="attention_pool")
        self.projection = nn.Linear(input_dim, output_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Queries and positions from a truncated normal of 0.02."""
        nn.init.trunc_normal_(self.queries, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, features: Float[Tensor, "images patches features"]) -> Float[Tensor, "images tokens dim"]:
        """What each query read, projected."""
        rows = self.norm(features)
        queries = self.queries.expand(len(features), -1, -1)
        return self.projection(self.attention(queries, rows + self.positions, rows))
