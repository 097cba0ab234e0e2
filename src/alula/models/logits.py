"""Scores only where somebody reads them: with a large vocabulary those of a long prompt are the largest tensor of a forward."""

import inspect

from torch import Tensor, nn

from alula.models.anatomy import base_model


def keeping(model: nn.Module, number: int | Tensor) -> dict[str, int | Tensor]:
    """The keyword by which `model` leaves out all logits but those of the last `number` tokens (0: none); empty where it cannot.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> keeping(LlamaForCausalLM(config), 3)
        {'logits_to_keep': 3}
    """
    known = inspect.signature(base_model(model).forward).parameters
    return {"logits_to_keep": number} if "logits_to_keep" in known else {}
