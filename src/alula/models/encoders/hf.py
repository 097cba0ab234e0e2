"""Any Hugging Face vision transformer (CLIP, SigLIP, DINOv2, ViT ...) as an encoder, built from its configuration."""

from jaxtyping import Float
from torch import Tensor
from transformers import AutoConfig, AutoModel

from alula.errors import UserError
from alula.models.encoders.base import ENCODERS, Encoder


@ENCODERS.register("hf")
class HfEncoder(Encoder):
    """The patch features of a Hugging Face vision model; class and register tokens in front are dropped.

    Args:
        config: `to_dict()` of the vision model's configuration; needs `model_type`, `image_size`, `patch_size`
            and `hidden_size`.
        layer: which hidden state to take; -1 is the last, -2 the one before (LLaVA's choice for CLIP).

    Raises:
        UserError: the configuration lacks one of the four keys, or they are not single numbers.

    Example:
        >>> import torch
        >>> from transformers import CLIPVisionConfig
        >>> tiny = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...                         image_size=16, patch_size=8)
        >>> HfEncoder(config=tiny.to_dict())(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 4, 8])
    """

    def __init__(self, *, config: dict, layer: int = -1) -> None:
        super().__init__()
        wanted = ("model_type", "image_size", "patch_size", "hidden_size")
        missing = [key for key in wanted if config.get(key) is None]
        if missing or not all(isinstance(config[key], int) for key in wanted[1:]):
            raise UserError(
                f"Encoder 'hf' got a configuration of type {config.get('model_type')!r} without a usable "
                f"{', '.join(missing) or 'single image_size, patch_size, hidden_size'}. It takes vision transformers "
                "with one square image size: pass CLIPVisionConfig(...).to_dict() or the like."
            )
        self.image_size = config["image_size"]
        self.num_tokens = (config["image_size"] // config["patch_size"]) ** 2
        self.output_dim = config["hidden_size"]
        self.layer = layer
        keywords = {key: value for key, value in config.items() if key != "model_type"}
        self.model = AutoModel.from_config(AutoConfig.for_model(config["model_type"], **keywords))

    def forward(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images patches dim"]:
        """The patch features of the chosen layer."""
        if self.layer == -1:
            features = self.model(pixel_values=pixel_values).last_hidden_state
        else:
            features = self.model(pixel_values=pixel_values, output_hidden_states=True).hidden_states[self.layer]
        return features[:, -self.num_tokens :]
