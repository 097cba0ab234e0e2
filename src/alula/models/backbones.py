"""The causal LM that a composition takes: looked up by its configuration first, loaded then. It knows no encoder and no connector."""

import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from alula.errors import UserError
from alula.models.composed_config import ComposedConfig
from alula.models.loading import EMBEDDED, changes_of
from alula.models.part_files import config_of

CACHE = "past_key_values"


def backbone_folder(backbone: str | Path) -> str:
    """Its folder or hub name."""
    if str(backbone) != EMBEDDED:
        return str(backbone)
    from alula.models.smol import prepare_smol

    return str(prepare_smol())


def read_backbone(place: str) -> PreTrainedConfig:
    """The configuration of the language model there; of a composed model that of its backbone.

    Raises:
        UserError: there is none, it is no causal LM of text alone, alula changed it, or it keeps no keys and values.
    """
    config = config_of(place, what="backbone", wanted="the folder or hub name of a causal LM, or `smol`")
    text = config.text_config if isinstance(config, ComposedConfig) else config
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING or text.get_text_config(decoder=True) is not text:
        raise UserError(
            f"The backbone in '{place}' has a {type(text).__name__}; a composition takes a causal LM of text alone. Give one, or `smol`; "
            "of a vision-language model save_pretrained its language model and give that folder."
        )
    if changes := [*changes_of(config), *changes_of(text)]:
        raise UserError(
            f"The backbone in '{place}' was changed by alula ({changes[0]}); a composition takes dense ones. Give the dense one; "
            "`upcycle` makes the composed model sparse afterwards."
        )
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    if CACHE not in inspect.signature(kind.forward).parameters:
        raise UserError(
            f"The backbone in '{place}' is a {kind.__name__}, which takes no `{CACHE}`: a composed model could not generate by it. Give a "
            "causal LM that keeps keys and values, such as a Llama, Qwen or Gemma, or `smol`."
        )
    return text


def load_backbone(place: str, *, rows: int, dtype: torch.dtype) -> PreTrainedModel:
    """The language model, with at least `rows` rows of token embeddings."""
    if isinstance(AutoConfig.from_pretrained(place), ComposedConfig):
        backbone: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(place, dtype=dtype).language_model  # type: ignore[assignment]
    else:
        backbone = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    if rows > len(backbone.get_input_embeddings().weight):  # type: ignore[arg-type]
        backbone.resize_token_embeddings(rows, mean_resizing=False)
    return backbone
