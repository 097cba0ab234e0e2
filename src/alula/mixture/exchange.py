"""The attention of a decoder exchanged for one around it, through Transformers' attention interface. It knows no caller."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from alula.errors import UserError

Attention = Callable[..., tuple[Tensor, Tensor | None]]
"""``(module, query, key, value, attention_mask, **keywords)`` to the output and, where they are in memory, the weights."""


def exchange_attention(
    model: nn.Module, *, decoder: str, name: str, around: Callable[[str], Attention], otherwise: str
) -> Callable[[], None]:
    """Lets the attention of `decoder` be ``<name>_<what it was>``; the encoder's stays, and so do all masks.

    Args:
        decoder: the path of the text stack in the model.
        around: makes the new attention, given the name of the former one, which `named_attention` calls.
        otherwise: what follows from a refusal, and what to do then: the end of the error's first sentence, and a second.

    Returns:
        what puts the former attention back.

    Raises:
        UserError: the model does not let its attention be exchanged.
    """
    text = model.get_submodule(decoder)
    while not isinstance(text, PreTrainedModel):
        decoder = decoder.rpartition(".")[0]
        text = model.get_submodule(decoder)
    before = text.config._attn_implementation
    after = f"{name}_{before}"
    AttentionInterface.register(after, around(before))
    AttentionMaskInterface.register(after, AttentionMaskInterface()[before])
    text.set_attn_implementation(after)
    if text.config._attn_implementation != after:
        raise UserError(f"{type(text).__name__} does not let its attention be exchanged, {otherwise}")
    return partial(text.set_attn_implementation, before)


def named_attention(name: str) -> Attention:
    """The attention that Transformers knows as `name`; ``eager`` is each modeling file's own."""
    known = AttentionInterface()

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        call = known[name] if name in known else sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
        return call(module, *args, **kwargs)

    return attend
