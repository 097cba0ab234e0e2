"""A vision-language model out of parts: any Hugging Face causal LM, one or several image encoders, a connector for each.

It is a plain `PreTrainedModel`: `generate`, `Trainer`, PEFT and lm-eval use it as they use LLaVA. It knows nothing of
experts, routers or tasks; keywords it does not know go down to the backbone's attention modules.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from alula.errors import UserError
from alula.models.composed_body import ComposedBody
from alula.models.composed_config import ComposedConfig
from alula.models.composed_processor import ComposedImageProcessor, ComposedProcessor
from alula.models.image_cache import ImageCache
from alula.models.logits import keeping
from alula.models.vision_mixture import VisionMixture
from alula.models.vision_parts import WITH_OWN_START, build_vision, start_afresh

__all__ = ["ComposedConfig", "ComposedFeatures", "ComposedOutput", "ComposedVLM", "register_auto_classes"]


@dataclass
class ComposedFeatures(BaseModelOutputWithPooling):
    """What images are encoded to; the last two fields are there with several encoders (see `Mixed`)."""

    encoder_weights: Tensor | None = None
    encoder_importance: Tensor | None = None


@dataclass
class ComposedOutput(CausalLMOutputWithPast):
    """The backbone's output and, on a call with images, the tokens that took the placeholders' places.

    With several encoders also the share and the importance of each (images, encoders); see `Mixed`.
    """

    image_hidden_states: Tensor | None = None
    encoder_weights: Tensor | None = None
    encoder_importance: Tensor | None = None


class ComposedVLM(PreTrainedModel, GenerationMixin):
    """Backbone, encoder and connector under the names `language_model`, `vision_tower` and `connector`.

    Of several encoders `vision_tower` is an `EncoderGroup` and `connector` a `VisionMixture`.

    Args:
        language_model: a loaded backbone of `config.text_config`; None makes one with fresh weights.

    Raises:
        UserError: the tokens per image and `config.image_seq_length` differ, a name is unknown, or parts do not fit.

    Example:
        >>> from transformers import LlamaConfig
        >>> backbone = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        ...                        num_attention_heads=2)
        >>> model = ComposedVLM(ComposedConfig(text_config=backbone, image_seq_length=1,
        ...                                    encoder_config={"name": "efficientnet_lite0", "image_size": 32}))
        >>> ids = torch.tensor([[7, 4, 9]])
        >>> model(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32)).logits.shape
        torch.Size([1, 3, 32])
    """

    config_class = ComposedConfig
    config: ComposedConfig
    input_modalities = ["image", "text"]  # noqa: RUF012 - the type Transformers declares
    image_cache: ImageCache | None = None
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # a promise about this class only: the backbone checks its own when it is built
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = {"InvertedBottleneck", "CAbstractorBlock", "DeformableLayer", "TransformerEncoderLayer"}  # noqa: RUF012 - the backbone's are added by post_init

    def __init__(self, config: ComposedConfig, *, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.vision_tower, self.connector = build_vision(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()
        for part in (self.vision_tower, self.connector):
            start_afresh(part)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, WITH_OWN_START):  # comes after its children, so it has the last word
            module.reset_parameters()

    @property
    def base_model(self) -> ComposedBody:
        """The model without its LM head; trainers that compute the loss in pieces (TRL) call it."""
        return ComposedBody(self)

    def get_decoder(self) -> nn.Module:
        """The backbone's stack, the module that has `.layers`."""
        return self.language_model.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Gives the backbone another token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The backbone's LM head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Gives the backbone another LM head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_image_features(
        self, pixel_values: Float[Tensor, "images ..."], instruction_embedding: Float[Tensor, "images width"] | None = None, **kwargs
    ) -> ComposedFeatures:
        """Encoder features as `last_hidden_state` and the connector's tokens, (images, tokens, dim), as `pooler_output`.

        The names are those of Transformers' own vision-language models; unknown keywords are ignored, as there. The features of several
        encoders are a tuple, `hidden_states`.

        Args:
            pixel_values: (images, 3, height, width), or (images, views, 3, height, width), whose tokens are put one after another.
            instruction_embedding: of the sentence that each image came with; needed if the encoders are weighed by it.

        Raises:
            UserError: the instruction is missing, or there is not one for each image.
        """
        images, views = len(pixel_values), pixel_values.shape[1] if pixel_values.dim() == 5 else 1
        pixels = pixel_values.reshape(-1, *pixel_values.shape[-3:]).to(self.dtype)
        features = self.vision_tower(pixels) if self.image_cache is None else self.image_cache(self.vision_tower, pixels)
        if not isinstance(self.connector, VisionMixture):
            tokens = self.connector(features)
            placed = tokens.unflatten(0, (images, views)).flatten(1, 2)
            return ComposedFeatures(last_hidden_state=features, pooler_output=placed)  # type: ignore[arg-type]
        instruction = None if instruction_embedding is None else instruction_embedding.repeat_interleave(views, 0)
        mixed = self.connector(features, instruction)
        return ComposedFeatures(
            hidden_states=tuple(features),
            pooler_output=mixed.tokens.unflatten(0, (images, views)).flatten(1, 2),
            encoder_weights=mixed.weights.unflatten(0, (images, views)).mean(1),
            encoder_importance=mixed.importance.unflatten(0, (images, views)).norm(dim=1),
        )

    def place_images(
        self,
        inputs_embeds: Float[Tensor, "batch tokens dim"],
        images: Float[Tensor, "images patches dim"],
        *,
        placeholders: Int[Tensor, "batch tokens"],
    ) -> Float[Tensor, "batch tokens dim"]:
        """The embeddings with each placeholder replaced, in reading order.

        Raises:
            UserError: there are not as many placeholders as image tokens.
        """
        count = int(placeholders.sum())
        if count != images.shape[0] * images.shape[1]:
            raise UserError(
                f"{count} image placeholders (id {self.config.image_token_id}) came in input_ids with {images.shape[0]} images "
                f"of {images.shape[1]} tokens each. Each image needs {images.shape[1]} placeholders in a row: let the "
                "processor make both, from a text with one <image> for each image, and do not truncate between."
            )
        return inputs_embeds.masked_scatter(placeholders.unsqueeze(-1), images.flatten(0, 1).to(inputs_embeds))

    def _idle_images(self) -> Float[Tensor, ""]:
        """Zero, by way of encoder and connector: keeps them in the graph of a rank whose batch has no image.

        Otherwise DDP waits for their gradients, and FSDP for their weights, for ever. Only used in distributed training.
        """
        size = self.vision_tower.image_size
        pixels = torch.zeros(1, 3, size, size, dtype=self.dtype, device=self.device)
        is_routed = isinstance(self.connector, VisionMixture) and self.connector.reads_instruction
        sentence = pixels.new_zeros(1, self.config.router_config.get("input_dim", 384)) if is_routed else None
        tokens = self.get_image_features(pixels, sentence).pooler_output
        assert tokens is not None
        return 0.0 * tokens.sum()

    def _needs_idle_images(self) -> bool:
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not is_distributed or not self.training:
            return False
        return any(value.requires_grad for part in (self.vision_tower, self.connector) for value in part.parameters())

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        pixel_values: Float[Tensor, "images ..."] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch tokens"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        instruction_embedding: Float[Tensor, "images width"] | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ComposedOutput | tuple:
        """The backbone's output; unknown keywords reach its attention modules.

        Args:
            pixel_values: all images of the batch in reading order, row by row, as `get_image_features` takes them; None if there are
                none.
            mm_encoder_outputs: `{"image": get_image_features(...)}` in place of `pixel_values`; `generate` does this to
                encode once.
            instruction_embedding: as `get_image_features` takes it; decoding needs none, because images are encoded before.
            labels: -100 where the loss does not look; not shifted.
            logits_to_keep: for how many of the last tokens (0: all) there are logits, where the backbone can leave others out.

        Raises:
            UserError: images and placeholders do not match, or not exactly one of `input_ids`, `inputs_embeds` came.
        """
        inputs_embeds, encoded = self.read_inputs(
            input_ids, inputs_embeds, pixel_values, instruction_embedding, past_key_values=past_key_values, encoded=mm_encoder_outputs
        )
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            return_dict=True,
            **keeping(self.language_model, logits_to_keep),
            **kwargs,
        )
        images, weights, importance = (getattr(encoded, name, None) for name in ("pooler_output", "encoder_weights", "encoder_importance"))
        result = ComposedOutput(image_hidden_states=images, encoder_weights=weights, encoder_importance=importance)
        for name, value in output.items():  # some backbones know more, such as the router's scores of an MoE
            result[name] = value
        return result if return_dict is not False else result.to_tuple()

    def read_inputs(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pixel_values: Tensor | None,
        instruction_embedding: Tensor | None,
        *,
        past_key_values: Cache | None,
        encoded: dict[str, BaseModelOutputWithPooling] | None,
    ) -> tuple[Float[Tensor, "batch tokens dim"], BaseModelOutputWithPooling | None]:
        """The embeddings that the backbone reads, images in their places, and what the images were encoded to; see `forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("Exactly one of input_ids and inputs_embeds is wanted. Drop the other, or give one of them.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        found = (encoded or {}).get("image")
        if found is None and pixel_values is not None:
            found = self.get_image_features(pixel_values, instruction_embedding)
        images = None if found is None else found.pooler_output
        is_prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        if images is not None or (is_prefill and input_ids is not None):
            placeholders = self._placeholders(input_ids, inputs_embeds)
            none = inputs_embeds.new_zeros(0, self.config.image_seq_length, inputs_embeds.shape[-1])
            inputs_embeds = self.place_images(inputs_embeds, none if images is None else images, placeholders=placeholders)
        if images is None and self._needs_idle_images():
            inputs_embeds = inputs_embeds + self._idle_images().to(inputs_embeds)
        return inputs_embeds, found

    def _placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)


def register_auto_classes() -> None:
    """Makes the Auto classes of Transformers know folders saved by `ComposedVLM` and `ComposedProcessor`."""
    AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)
    AutoModel.register(ComposedConfig, ComposedVLM, exist_ok=True)
    AutoModelForImageTextToText.register(ComposedConfig, ComposedVLM, exist_ok=True)
    # One class for both backends: an installed torchvision must not change the pixels a model was trained on.
    backends: dict[str, type] = {"pil": ComposedImageProcessor, "torchvision": ComposedImageProcessor}
    AutoImageProcessor.register(ComposedConfig, image_processor_classes=backends, exist_ok=True)
    AutoProcessor.register(ComposedConfig, ComposedProcessor, exist_ok=True)
