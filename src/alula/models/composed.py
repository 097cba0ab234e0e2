"""A vision-language model out of three parts: any Hugging Face causal LM, an image encoder and a connector.

It is a plain `PreTrainedModel`: `generate`, `Trainer`, PEFT and lm-eval use it as they use LLaVA. It knows nothing of
experts, routers or tasks; keywords it does not know go down to the backbone's attention modules.
"""

from dataclasses import dataclass
from typing import ClassVar

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
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from alula.errors import UserError
from alula.models.composed_processor import ComposedImageProcessor, ComposedProcessor
from alula.models.connectors import CONNECTORS
from alula.models.encoders import ENCODERS, Encoder


class ComposedConfig(PreTrainedConfig):
    """The three parts and where images go.

    Args:
        text_config: configuration of the backbone, any type `AutoModelForCausalLM` knows; None is a default Llama.
        encoder_config: `{"name": <registered encoder>, **its keywords}`.
        connector_config: `{"name": <registered connector>, **its keywords}`; the two widths come from the neighbours.
        image_token_id: the placeholder in `input_ids`; an id of the backbone's vocabulary.
        image_seq_length: tokens per image; must be what the encoder gives.
    """

    model_type = "alula_composed"
    sub_configs: ClassVar[dict] = {"text_config": AutoConfig}

    def __init__(
        self,
        *,
        text_config: PreTrainedConfig | dict | None = None,
        encoder_config: dict | None = None,
        connector_config: dict | None = None,
        image_token_id: int = 4,
        image_seq_length: int = 16,
        **kwargs,
    ) -> None:
        if isinstance(text_config, dict):
            keywords = dict(text_config)
            text_config = AutoConfig.for_model(keywords.pop("model_type", "llama"), **keywords)
        self.text_config = text_config or LlamaConfig()
        self.encoder_config = dict(encoder_config or {"name": "efficientnet_lite0"})
        self.connector_config = dict(connector_config or {"name": "mlp"})
        self.image_token_id = image_token_id
        self.image_seq_length = image_seq_length
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)


@dataclass
class ComposedOutput(CausalLMOutputWithPast):
    """The backbone's output and, on a call with images, the tokens that took the placeholders' places."""

    image_hidden_states: Tensor | None = None


class ComposedVLM(PreTrainedModel, GenerationMixin):
    """Backbone, encoder and connector under the names `language_model`, `vision_tower` and `connector`.

    Raises:
        UserError: the encoder's tokens per image and `config.image_seq_length` differ, or a name is unknown.

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
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # a promise about this class only: the backbone checks its own when it is built
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = {"InvertedBottleneck"}  # noqa: RUF012 - the backbone's are added by post_init

    def __init__(self, config: ComposedConfig) -> None:
        super().__init__(config)
        encoder, connector = dict(config.encoder_config), dict(config.connector_config)
        self.vision_tower = ENCODERS[encoder.pop("name")](**encoder)
        if self.vision_tower.num_tokens != config.image_seq_length:
            raise UserError(
                f"image_seq_length={config.image_seq_length} came, but the encoder {config.encoder_config['name']!r} gives "
                f"{self.vision_tower.num_tokens} tokens for an image. Set image_seq_length={self.vision_tower.num_tokens}."
            )
        width = config.text_config.hidden_size
        self.connector = CONNECTORS[connector.pop("name")](self.vision_tower.output_dim, width, **connector)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Encoder):  # comes after its children, so it has the last word
            module.reset_parameters()

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

    def get_image_features(self, pixel_values: Float[Tensor, "images 3 height width"], **kwargs) -> BaseModelOutputWithPooling:
        """Encoder features as `last_hidden_state` and the connector's tokens, (images, tokens, dim), as `pooler_output`.

        The names are those of Transformers' own vision-language models; unknown keywords are ignored, as there.
        """
        features = self.vision_tower(pixel_values.to(self.dtype))
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.connector(features))

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
        return 0.0 * self.connector(self.vision_tower(pixels)).sum()

    def _needs_idle_images(self) -> bool:
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not is_distributed or not self.training:
            return False
        return any(value.requires_grad for part in (self.vision_tower, self.connector) for value in part.parameters())

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        pixel_values: Float[Tensor, "images 3 height width"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch tokens"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch tokens dim"] | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> ComposedOutput | tuple:
        """The backbone's output; unknown keywords reach its attention modules.

        Args:
            pixel_values: all images of the batch in reading order, row by row; None if there are none.
            mm_encoder_outputs: `{"image": get_image_features(...)}` in place of `pixel_values`; `generate` does this to
                encode once.
            labels: -100 where the loss does not look; not shifted.

        Raises:
            UserError: images and placeholders do not match, or not exactly one of `input_ids`, `inputs_embeds` came.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("Exactly one of input_ids and inputs_embeds is wanted. Drop the other, or give one of them.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is None and pixel_values is not None:
            encoded = self.get_image_features(pixel_values)
        images = None if encoded is None else encoded.pooler_output
        is_prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        if images is not None or (is_prefill and input_ids is not None):
            placeholders = self._placeholders(input_ids, inputs_embeds)
            none = inputs_embeds.new_zeros(0, self.config.image_seq_length, inputs_embeds.shape[-1])
            inputs_embeds = self.place_images(inputs_embeds, none if images is None else images, placeholders=placeholders)
        if images is None and self._needs_idle_images():
            inputs_embeds = inputs_embeds + self._idle_images().to(inputs_embeds)
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            return_dict=True,
            **kwargs,
        )
        result = ComposedOutput(image_hidden_states=images)
        for name, value in output.items():  # some backbones know more, such as the router's scores of an MoE
            result[name] = value
        return result if return_dict is not False else result.to_tuple()

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
