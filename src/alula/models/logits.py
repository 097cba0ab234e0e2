"""Scores only where somebody reads them: with a large vocabulary those of a long prompt are the largest tensor of a forward."""

import inspect

import torch
from torch import Tensor, nn

from alula.models.anatomy import base_model


def keeping(model: nn.Module, number: int | Tensor) -> dict[str, int | Tensor]:
    """The keyword by which `model` leaves out all logits but those of the last `number` tokens (0: none); empty where it cannot.

    On the CPU the tokens are named one by one. A slice of the hidden states has gaps, so that torch would multiply row by row and read the
    head's matrix as often: with four rows that takes twice the time, more than what is left out saves.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> keeping(LlamaForCausalLM(config), 3)
        {'logits_to_keep': tensor([-3, -2, -1])}
    """
    whole = base_model(model)
    if "logits_to_keep" not in inspect.signature(whole.forward).parameters:
        return {}
    takes_index = type(whole).__module__.startswith(("transformers.", "alula."))  # code from elsewhere may take a number only
    if isinstance(number, int) and number and takes_index and next(model.parameters()).device.type == "cpu":
        return {"logits_to_keep": torch.arange(-number, 0)}
    return {"logits_to_keep": number}
