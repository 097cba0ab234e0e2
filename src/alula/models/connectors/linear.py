"""One linear layer."""

from jaxtyping import Float
from torch import Tensor, nn

from alula.models.connectors.base import CONNECTORS, Connector


@CONNECTORS.register("linear")
class LinearConnector(Connector):
    """One linear layer; one token a patch.

    Source: Liu et al., "Visual Instruction Tuning", equation 1, https://arxiv.org/abs/2304.08485.

    Args:
        input_dim: width of the encoder's features.
        output_dim: width of the backbone.
        grid: rows and columns of the encoder's patches.
    """

    def __init__(self, input_dim: int, output_dim: int, *, grid: tuple[int, int]) -> None:
        super().__init__()
        self.num_tokens = grid[0] * grid[1]
        self.projection = nn.Linear(input_dim, output_dim)

    def forward(self, features: Float[Tensor, "images patches features"]) -> Float[Tensor, "images tokens dim"]:
        """The projected tokens."""
        return self.projection(features)
