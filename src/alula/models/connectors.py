"""Encoder features -> tokens of the backbone's width. It knows neither the encoder nor the backbone."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from alula.registry import Registry


class Connector(nn.Module, ABC):
    """One token for each feature row."""

    @abstractmethod
    def forward(self, features: Float[Tensor, "images patches features"]) -> Float[Tensor, "images patches dim"]:
        """The tokens that take the placeholders' places."""


CONNECTORS: Registry[type[Connector]] = Registry("connector")


@CONNECTORS.register("mlp")
class MlpConnector(Connector):
    """LayerNorm, then two linear layers with GELU between.

    Source: Liu et al., "Improved Baselines with Visual Instruction Tuning", section 3.3,
    https://arxiv.org/abs/2310.03744. Ours in front: the LayerNorm, because convolutional features are not normalised.

    Args:
        input_dim: width of the encoder's features.
        output_dim: width of the backbone.
        hidden_dim: None means `output_dim`.

    Example:
        >>> import torch
        >>> MlpConnector(6, 4)(torch.zeros(2, 3, 6)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, input_dim: int, output_dim: int, *, hidden_dim: int | None = None) -> None:
        super().__init__()
        width = hidden_dim or output_dim
        self.norm = nn.LayerNorm(input_dim)
        self.inner = nn.Linear(input_dim, width)
        self.outer = nn.Linear(width, output_dim)

    def forward(self, features: Float[Tensor, "images patches features"]) -> Float[Tensor, "images patches dim"]:
        """The projected tokens."""
        return self.outer(nn.functional.gelu(self.inner(self.norm(features))))


@CONNECTORS.register("linear")
class LinearConnector(Connector):
    """One linear layer.

    Source: Liu et al., "Visual Instruction Tuning", equation 1, https://arxiv.org/abs/2304.08485.

    Args:
        input_dim: width of the encoder's features.
        output_dim: width of the backbone.
    """

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(input_dim, output_dim)

    def forward(self, features: Float[Tensor, "images patches features"]) -> Float[Tensor, "images patches dim"]:
        """The projected tokens."""
        return self.projection(features)
