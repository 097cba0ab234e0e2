"""Any Hugging Face vision transformer (CLIP, SigLIP, DINOv2, ViT ...) as an encoder, built from its configuration."""

import inspect

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from alula.errors import UserError
from alula.models.encoders.base import ENCODERS, Encoder, count_patches

METHOD = "interpolate_pos_encoding"
"""The name that Transformers gives both the method and the keyword."""


@ENCODERS.register("hf")
class HfEncoder(Encoder):
    """The patch features of a Hugging Face vision model; class and register tokens in front are dropped.

    Args:
        config: `to_dict()` of the vision model's configuration; needs `model_type`, `image_size`, `patch_size`
            and `hidden_size`.
        layer: which hidden state to take; -1 is the last, -2 the one before (LLaVA's choice for CLIP).
        image_size: pixels, a multiple of the patch size; at another resolution than the configuration's the position embeddings are
            interpolated. None is the configuration's.

    Raises:
        UserError: the configuration lacks one of the four keys, or they are not single numbers; the model cannot interpolate its
            positions.

    Example:
        >>> import torch
        >>> from transformers import CLIPVisionConfig
        >>> tiny = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                         image_size=16, patch_size=8)
        >>> HfEncoder(config=tiny.to_dict())(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 4, 8])
        >>> HfEncoder(config=tiny.to_dict(), image_size=32)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 16, 8])
    """

    def __init__(self, *, config: dict, layer: int = -1, image_size: int | None = None) -> None:
        super().__init__()
        wanted = ("model_type", "image_size", "patch_size", "hidden_size")
        missing = [key for key in wanted if config.get(key) is None]
        if missing or not all(isinstance(config[key], int) for key in wanted[1:]):
            raise UserError(
                f"Encoder 'hf' got a configuration of type {config.get('model_type')!r} without a usable "
                f"{', '.join(missing) or 'single image_size, patch_size, hidden_size'}. It takes vision transformers "
                "with one square image size: pass CLIPVisionConfig(...).to_dict() or the like."
            )
        trained, patch_size = config["image_size"], config["patch_size"]
        self.image_size = image_size or trained
        is_interpolated = self.image_size != trained
        side = count_patches(self.image_size, patch_size, name="hf") if is_interpolated else trained // patch_size
        self.grid = (side, side)
        self.output_dim = config["hidden_size"]
        self.layer = layer
        keywords = {key: value for key, value in config.items() if key != "model_type"}
        self.model = AutoModel.from_config(AutoConfig.for_model(config["model_type"], **keywords))
        has_keyword = METHOD in inspect.signature(self.model.forward).parameters
        if is_interpolated and not (has_keyword or _interpolates_by_itself(self.model)):
            old = trained // patch_size
            raise UserError(
                f"{type(self.model).__name__} was trained at {trained} pixels: {trained} / {patch_size} = {old}, {old} x {old} = {old**2} "
                f"positions. image_size={self.image_size} needs {side} x {side} = {side**2}, and this class has no {METHOD} to make them. "
                f"Set image_size={trained}, or take a model that has one (CLIP, SigLIP, DINOv2, ViT)."
            )
        self.keywords = {METHOD: True} if is_interpolated and has_keyword else {}

    def forward(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images patches dim"]:
        """The patch features of the chosen layer."""
        if self.layer == -1:
            features = self.model(pixel_values=pixel_values, **self.keywords).last_hidden_state
        else:
            features = self.model(pixel_values=pixel_values, output_hidden_states=True, **self.keywords).hidden_states[self.layer]
        return features[:, -self.num_tokens :]


def _interpolates_by_itself(model: nn.Module) -> bool:
    """Whether a part has the method without being asked by a keyword, as in DINOv2."""
    return any(hasattr(module, METHOD) for module in model.modules())
