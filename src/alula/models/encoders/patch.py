"""An encoder for rendered text: long narrow patches, few layers (the role of Pix2Struct)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from alula.models.encoders.base import ENCODERS, Encoder, count_patches
from alula.models.heads import head_dim


@ENCODERS.register("patch")
class PatchEncoder(Encoder):
    """A linear embedding of each patch plus one for its row and one for its column, then a few transformer blocks.

    Source: Lee et al., "Pix2Struct", section 2.1, https://arxiv.org/abs/2210.03347: each image is normalised by its own mean and
    deviation, and rows and columns have absolute embeddings. Pix2Struct keeps an image's aspect ratio and so gives another grid for
    each image; here every image is squeezed to one square, and patches that are not square (a letter is higher than wide) take over
    a part of that role: the grid is fixed, `image_size / height` rows by `image_size / width` columns.

    Args:
        image_size: pixels, a multiple of both sides of a patch.
        patch_size: height and width of a patch in pixels.
        dim: width.
        num_layers: blocks.
        num_heads: a divisor of `dim`.
        trained_size: the image size that its rows and columns are for; at another `image_size` each is interpolated along its line.
            None is `image_size`.

    Raises:
        UserError: `image_size` or `trained_size` is no multiple of a side of the patch, or `dim` of `num_heads`.

    Example:
        >>> import torch
        >>> encoder = PatchEncoder(image_size=32, patch_size=(16, 8), dim=12, num_layers=1)
        >>> encoder.grid, encoder(torch.zeros(1, 3, 32, 32)).shape
        ((2, 4), torch.Size([1, 8, 12]))
    """

    def __init__(
        self,
        *,
        image_size: int = 128,
        patch_size: Sequence[int] = (16, 8),
        dim: int = 192,
        num_layers: int = 2,
        num_heads: int = 3,
        trained_size: int | None = None,
    ) -> None:
        super().__init__()
        head_dim(dim, num_heads=num_heads, kind="Encoder 'patch'")
        self.height, self.width = patch_size
        self.grid = self._grid(image_size)
        rows, columns = self._grid(trained_size or image_size, keyword="trained_size" if trained_size else "image_size")
        self.image_size, self.output_dim = image_size, dim
        self.embedding = nn.Linear(3 * self.height * self.width, dim)
        self.rows = nn.Parameter(torch.empty(rows, 1, dim))
        self.columns = nn.Parameter(torch.empty(1, columns, dim))
        block = nn.TransformerEncoderLayer(dim, num_heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, num_layers, norm=nn.LayerNorm(dim), enable_nested_tensor=False)
        self.reset_parameters()

    def _grid(self, size: int, *, keyword: str = "image_size") -> tuple[int, int]:
        rows, columns = (count_patches(size, side, name="patch", keyword=keyword) for side in (self.height, self.width))
        return rows, columns

    def reset_parameters(self) -> None:
        """Places from a truncated normal of 0.02."""
        nn.init.trunc_normal_(self.rows, std=0.02)
        nn.init.trunc_normal_(self.columns, std=0.02)

    def forward(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images patches dim"]:
        """The last block's features, normalised."""
        deviation, mean = torch.std_mean(pixel_values, (1, 2, 3), keepdim=True)
        pixels = (pixel_values - mean) / deviation.clamp(min=pixel_values[0].numel() ** -0.5)  # one colour has no deviation
        cut = pixels.unfold(2, self.height, self.height).unfold(3, self.width, self.width)
        patches = self.embedding(cut.permute(0, 2, 3, 1, 4, 5).flatten(3))
        rows, columns = _stretched(self.rows, self.grid[0], along=0), _stretched(self.columns, self.grid[1], along=1)
        return self.blocks((patches + rows + columns).flatten(1, 2))


def _stretched(places: Float[Tensor, "rows columns dim"], count: int, *, along: int) -> Float[Tensor, "rows columns dim"]:
    """As many places in the same line; where they are as many already, those."""
    if places.shape[along] == count:
        return places
    line = places.squeeze(1 - along).T.unsqueeze(0)
    return functional.interpolate(line, size=count, mode="linear").squeeze(0).T.unsqueeze(1 - along)
