"""What every image encoder promises: pixels in, one row of features a patch out. It knows no language model."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from alula.errors import UserError
from alula.registry import Registry


class Encoder(nn.Module, ABC):
    """Pixels -> features. `grid`, `output_dim` and `image_size` are set by the constructor."""

    image_size: int
    """Height and width of the pixels it takes."""
    grid: tuple[int, int]
    """Rows and columns of the feature rows it gives for one image."""
    output_dim: int
    """Width of one feature row."""

    @property
    def num_tokens(self) -> int:
        """Feature rows it gives for one image."""
        return self.grid[0] * self.grid[1]

    @abstractmethod
    def forward(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images patches dim"]:
        """One row of features for each patch, left to right, top to bottom."""

    def reset_parameters(self) -> None:
        """Fresh random weights, through `torch.nn.init` only (Transformers guards those for loaded weights). Optional."""


ENCODERS: Registry[type[Encoder]] = Registry("encoder")


def count_patches(image_size: int, patch_size: int, *, name: str, keyword: str = "image_size") -> int:
    """Patches along one side of an image.

    Args:
        keyword: how the size is called, for the error.

    Raises:
        UserError: the patches do not fill the image.
    """
    count, rest = divmod(image_size, patch_size)
    if count <= 0 or rest:
        low = max(count, 1) * patch_size
        raise UserError(
            f"Encoder '{name}' got {keyword}={image_size} with patches of {patch_size} pixels: {image_size} = {count} x {patch_size} "
            f"+ {rest}. It takes multiples of {patch_size}. Set {keyword}={low} or {low + patch_size}."
        )
    return count
