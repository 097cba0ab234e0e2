"""What every image encoder promises: pixels in, one row of features a patch out. It knows no language model."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from alula.registry import Registry


class Encoder(nn.Module, ABC):
    """Pixels -> features. `num_tokens`, `output_dim` and `image_size` are set by the constructor."""

    image_size: int
    """Height and width of the pixels it takes."""
    num_tokens: int
    """Feature rows it gives for one image; the language model sees as many placeholder tokens."""
    output_dim: int
    """Width of one feature row."""

    @abstractmethod
    def forward(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images patches dim"]:
        """One row of features for each patch, left to right, top to bottom."""

    def reset_parameters(self) -> None:
        """Fresh random weights, through `torch.nn.init` only (Transformers guards those for loaded weights). Optional."""


ENCODERS: Registry[type[Encoder]] = Registry("encoder")
