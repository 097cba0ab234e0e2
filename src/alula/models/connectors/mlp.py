"""Two linear layers."""

from jaxtyping import Float
from torch import Tensor, nn

from alula.models.connectors.base import CONNECTORS, Connector


@CONNECTORS.register("mlp")
class MlpConnector(Connector):
    """LayerNorm, then two linear layers with GELU between; one token a patch.

    Source: Liu et al., "Improved Baselines with Visual Instruction Tuning", section 3.3,
    https://arxiv.org/abs/2310.03744. Ours in front: the LayerNorm, because convolutional features are not normalised.

    Args:
        input_dim: width of the encoder's features.
        output_dim: width of the backbone.
        grid: rows and columns of the encoder's patches.
        hidden_dim: None means `output_dim`.

    Example:
        >>> import torch
        >>> MlpConnector(6, 4, grid=(1, 3))(torch.zeros(2, 3, 6)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, input_dim: int, output_dim: int, *, grid: tuple[int, int], hidden_dim: int | None = None) -> None:
        super().__init__()
        width = output_dim if hidden_dim is None else hidden_dim
        self.num_tokens = grid[0] * grid[1]
        self.norm = nn.LayerNorm(input_dim)
        self.inner = nn.Linear(input_dim, width)
        self.outer = nn.Linear(width, output_dim)

    def forward(self, features: Float[Tensor, "images patches features"]) -> Float[Tensor, "images tokens dim"]:
        """The projected tokens."""
        return self.outer(nn.functional.gelu(self.inner(self.norm(features))))
