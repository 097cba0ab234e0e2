"""Any Hugging Face vision model (CLIP, SigLIP, DINOv2, Swin, ConvNeXt, ResNet ...) as an encoder, built from its configuration."""

import inspect
import math
from collections.abc import Mapping
from itertools import chain
from typing import Self

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from alula.errors import UserError
from alula.models.encoders.base import ENCODERS, Encoder, count_patches
from alula.models.trial import tried

METHOD = "interpolate_pos_encoding"
"""The name that Transformers gives both the method and the keyword."""
OF_THE_WHOLE = ("model_type", "dtype")
"""Keys of a configuration that are no keywords of its class, or the composed model's to say."""
ANOTHER = "Take another one, such as CLIP, SigLIP, DINOv2, Swin or ConvNeXt."


@ENCODERS.register("hf")
class HfEncoder(Encoder):
    """A hidden state of a Hugging Face vision model: the rows of its patches without class, register and detection tokens, or its map.

    What the model gives is asked when it is built, by a forward on torch's meta device, which computes nothing. Batch norms stay in
    evaluation mode: statistics of a few task images would overwrite those that the model was trained with.

    Args:
        config: `to_dict()` of the vision model's configuration.
        layer: which hidden state to take; -1 is the last, -2 the one before (LLaVA's choice for CLIP).
        image_size: pixels, a multiple of the patch size; at another resolution than the configuration's the position embeddings are
            interpolated, or computed anew where they are no parameters (DINOv3). None is the configuration's; those of some
            convolutional networks name none.

    Raises:
        UserError: there is no such model or configuration; it does not take pixels alone; what it gives is neither one row a patch nor
            a square map; there is no such layer; the model cannot interpolate its positions.

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
        self.model = _fresh(_read(config))
        trained = _single(self.model.config, "image_size") or image_size
        if trained is None:
            raise UserError(f"The configuration of {self._name} names no single image_size. Set image_size, for example to 224.")
        self.image_size, self.layer = image_size or trained, layer
        is_resized = self.image_size != trained
        has_keyword = METHOD in inspect.signature(self.model.forward).parameters
        self.keywords = {METHOD: True} if is_resized and has_keyword else {}
        if layer != -1:
            self.keywords["output_hidden_states"] = True
        self.eval()
        shape = self._shape(trained)
        self.grid, self.first = self._laid_out(shape, trained)
        if is_resized:
            if len(shape) == 3:
                self._check_positions(trained, self.grid[0])
            shape = self._shape(self.image_size)
            self.grid, self.first = self._laid_out(shape, self.image_size)
        self.output_dim = shape[1] if len(shape) == 4 else shape[2]
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As any module, but for batch norms."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pixel_values: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images patches dim"]:
        """The patch features of the chosen layer."""
        features = self._chosen(self.model(pixel_values=pixel_values, **self.keywords))
        rows = features.flatten(2).transpose(1, 2) if features.dim() == 4 else features
        return rows[:, self.first : self.first + self.num_tokens]

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _chosen(self, output: BaseModelOutput) -> Tensor:
        if self.layer == -1:
            return output.last_hidden_state  # type: ignore[return-value]
        states = output.hidden_states or ()
        if not -len(states) <= self.layer < len(states):
            raise UserError(
                f"Encoder 'hf' got layer={self.layer}, but {self._name} has {len(states)} hidden states: -{len(states)} to "
                f"{len(states) - 1} are accepted. Set layer=-1 for the last."
            )
        return states[self.layer]

    def _shape(self, size: int) -> tuple[int, ...]:
        """Of the chosen state of two images; where only real weights could tell, what the configuration says."""
        held = {name: value.to("meta") for name, value in chain(self.model.named_parameters(), self.model.named_buffers())}
        found = tried(
            lambda pixels: self._chosen(functional_call(self.model, held, kwargs={"pixel_values": pixels, **self.keywords})),
            torch.empty(2, 3, size, size, device="meta", dtype=self.model.dtype),
            name=self._name,
            wanted=f"Encoder 'hf' takes models that need pixel_values alone and give last_hidden_state. {ANOTHER}",
        )
        if found is not None:
            return tuple(found.shape)
        return 2, (size // self.model.config.patch_size) ** 2, self.model.config.hidden_size

    def _laid_out(self, shape: tuple[int, ...], size: int) -> tuple[tuple[int, int], int]:
        """Rows and columns of the patches, and how many rows come before them."""
        if len(shape) == 4 and shape[0] == 2 and shape[2] == shape[3]:
            return (shape[2], shape[3]), 0
        rows, patch = shape[1] - getattr(self.model.config, "num_detection_tokens", 0), _single(self.model.config, "patch_size")
        side = size // patch if patch else 0
        is_merged = not side or rows < side**2  # fewer rows than patches, as in Swin
        if is_merged:
            side = math.isqrt(rows)
        if len(shape) == 3 and shape[0] == 2 and (not is_merged or side**2 == rows):
            return (side, side), rows - side**2
        raise UserError(
            f"{self._name} makes {shape} of 2 images of {size} x {size} pixels. Encoder 'hf' takes models that make a map, (2, width, n, "
            f"n), or (2, rows, width) with n x n rows: {side} x {side} = {side**2}, {side + 1} x {side + 1} = {(side + 1) ** 2}. {ANOTHER}"
        )

    def _check_positions(self, trained: int, old: int) -> None:
        """Whether the positions of the patches can be made for another resolution."""
        patch = trained // old
        new = count_patches(self.image_size, patch, name="hf")
        has_method = METHOD in self.keywords or any(hasattr(module, METHOD) for module in self.model.modules())
        if not has_method and any("pos" in name for name, _ in self.model.named_parameters()):  # else they are computed, as by rotation
            raise UserError(
                f"{self._name} was trained at {trained} pixels: {trained} / {patch} = {old}, {old} x {old} = {old**2} positions. "
                f"image_size={self.image_size} needs {new} x {new} = {new**2}, and this class has no {METHOD} to make them. "
                f"Set image_size={trained}, or take a model that has one (CLIP, SigLIP, DINOv2, ViT)."
            )


def _read(config: Mapping[str, object]) -> PreTrainedConfig:
    kind = str(config.get("model_type"))
    try:
        return AutoConfig.for_model(kind, **{key: value for key, value in config.items() if key not in OF_THE_WHOLE})
    except Exception as error:  # each class checks its own way
        raise UserError(
            f"Encoder 'hf' got a configuration of type '{kind}' that Transformers refuses: {error!s:.200} Give the to_dict() of a vision "
            "model's configuration: what it leaves out, such as patch_size, is its class's default."
        ) from error


def _fresh(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration: by the table of `AutoModel`, or by its name, of `BlipVisionConfig` a `BlipVisionModel`."""
    if type(config) in MODEL_MAPPING:
        return AutoModel.from_config(config)
    name = f"{type(config).__name__.removesuffix('Config')}Model"
    if not hasattr(transformers, name):
        raise UserError(
            f"Transformers has no {name} for a configuration of type '{config.model_type}'. Encoder 'hf' takes configurations of vision "
            "models, such as CLIPVisionConfig(...).to_dict(). Give the one of the vision part alone."
        )
    return getattr(transformers, name)(config)


def _single(config: PreTrainedConfig, key: str) -> int | None:
    """A number that may stand there once for each direction."""
    values = getattr(config, key, None)
    values = set(values) if isinstance(values, list | tuple) else {values}
    value = values.pop() if len(values) == 1 else None
    return value if isinstance(value, int) else None
