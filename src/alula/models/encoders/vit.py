"""A vision transformer small enough to be trained here, by contrast with text (CLIP) or by predicting patches (AIM)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from alula.models.encoders.base import ENCODERS, Encoder, count_patches
from alula.models.heads import head_dim


@ENCODERS.register("vit")
class VitEncoder(Encoder):
    """Transformers' SigLIP vision model, which has no class token and no pooling: one row a patch in, one out.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", section 3.1, https://arxiv.org/abs/2010.11929. AIM's trunk
    (https://arxiv.org/abs/2401.08541) has fixed sine positions and no biases; here positions are learnt and there are biases.

    Args:
        image_size: pixels, a multiple of `patch_size`.
        patch_size: pixels.
        dim: width.
        num_layers: blocks.
        num_heads: a divisor of `dim`.
        trained_size: the image size that its position embeddings are for; at another `image_size` they are interpolated.
            None is `image_size`.

    Raises:
        UserError: `image_size` or `trained_size` is no multiple of `patch_size`, or `dim` of `num_heads`.

    Example:
        >>> import torch
        >>> VitEncoder(image_size=32, patch_size=8, dim=12, num_layers=1)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 16, 12])
    """

    def __init__(
        self,
        *,
        image_size: int = 64,
        patch_size: int = 8,
        dim: int = 192,
        num_layers: int = 6,
        num_heads: int = 3,
        trained_size: int | None = None,
    ) -> None:
        super().__init__()
        head_dim(dim, num_heads=num_heads, kind="Encoder 'vit'")
        side = count_patches(image_size, patch_size, name="vit")
        trained = trained_size or image_size
        count_patches(trained, patch_size, name="vit", keyword="trained_size")
        self.image_size, self.grid, self.output_dim = image_size, (side, side), dim
        self.is_interpolated = trained != image_size
        config = SiglipVisionConfig(
            hidden_size=dim,
            intermediate_size=4 * dim,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            image_size=trained,
            patch_size=patch_size,
            vision_use_head=False,
        )
        self.model = SiglipVisionModel(config)

    def forward(
        self, pixel_values: Float[Tensor, "images 3 height width"], *, mask: Bool[Tensor, "images patches patches"] | None = None
    ) -> Float[Tensor, "images patches dim"]:
        """The last block's features, normalised.

        Args:
            mask: which patch (row) may read which (column); None is all. AIM's prefix-causal mask goes here.
        """
        keywords = {}
        if mask is not None:
            dtype = self.model.dtype
            keywords["attention_mask"] = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min).unsqueeze(1)
        return self.model(pixel_values, interpolate_pos_encoding=self.is_interpolated, **keywords).last_hidden_state
