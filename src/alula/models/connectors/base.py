"""What every connector promises, and the arithmetic that several of them refuse bad sizes with."""

import math
from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from alula.errors import UserError
from alula.registry import Registry


class Connector(nn.Module, ABC):
    """The features of one image's patches -> `num_tokens` tokens.

    It is built as `Connector(input_dim=..., output_dim=..., grid=(rows, columns), **options)`: `input_dim` is the width of the encoder's
    features, `output_dim` that of the backbone, `grid` the rows and columns of the encoder's patches; they need not be equal.
    """

    num_tokens: int
    """Tokens it gives for one image."""

    @abstractmethod
    def forward(self, features: Float[Tensor, "images patches features"]) -> Float[Tensor, "images tokens dim"]:
        """The tokens that take the placeholders' places."""

    def reset_parameters(self) -> None:
        """Fresh random weights, where the usual normal(0, 0.02) is not right. Optional.

        Through `torch.nn.init` and `transformers.initialization` only: Transformers guards those for loaded weights.
        """


CONNECTORS: Registry[type[Connector]] = Registry("connector")


def as_map(features: Float[Tensor, "images patches features"], grid: tuple[int, int]) -> Float[Tensor, "images features rows columns"]:
    """The rows of features in their places."""
    return features.transpose(1, 2).unflatten(2, grid)


def square_side(num_tokens: int, *, name: str) -> int:
    """The side of a square of `num_tokens`.

    Args:
        name: of the connector, for the error.

    Raises:
        UserError: there is none.
    """
    side = math.isqrt(max(num_tokens, 0))
    if side == 0 or side * side != num_tokens:
        low = max(side, 1)
        raise UserError(
            f"Connector '{name}' got num_tokens={num_tokens}, which is no square: {low} x {low} = {low**2}, "
            f"{low + 1} x {low + 1} = {(low + 1) ** 2}. It lays its tokens out in a square. Set num_tokens={low**2} or {(low + 1) ** 2}."
        )
    return side


def pooled_side(num_tokens: int, *, grid: tuple[int, int], name: str) -> int:
    """As `square_side`, for a connector that pools: a square larger than the grid would repeat patches.

    Raises:
        UserError: `num_tokens` is no square, or its side is longer than a side of the grid.
    """
    side, most = square_side(num_tokens, name=name), min(grid)
    if side > most:
        raise UserError(
            f"Connector '{name}' got num_tokens={num_tokens} = {side} x {side}, but the encoder gives {grid[0]} x {grid[1]} patches: "
            f"pooled, tokens would be copies of each other. Set num_tokens={most**2} ({most} x {most}) or less, or a higher resolution."
        )
    return side
