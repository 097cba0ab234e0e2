"""Extra value columns: what attention weights sum to over groups of keys, at full speed.

For any matrix C of one row per key, ``softmax(q k^T) C`` is what fused attention computes if C stands beside the values.
So a sum of attention weights, over image tokens or with one weight per position, needs no weights in memory. It knows no
learner and no router.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from alula.errors import UserError

KEYWORD = "alula_columns"
APART = "alula_columns_apart"
PREFIX = "columns_"
WIDTH = 8
"""Columns a call can carry; head sizes that are multiples of 8 keep fused kernels at full speed."""


def carry_columns(model: nn.Module, *, decoder: str) -> Callable[[], None]:
    """Lets the attention of `decoder` carry columns; where none are given it computes what it did before.

    A call gives columns by the keyword `KEYWORD` (batch x keys x columns, for all keys of the sequence up to now), and
    finds ``sum_heads softmax(q k^T) C`` in the second place of the attention module's output, where attention weights
    would be. With the keyword `APART` the host's own call is left as it is and the columns get one of their own.

    Returns:
        what puts the model's own attention back.

    Raises:
        UserError: the model's attention is not one that can be exchanged.
    """
    text = model.get_submodule(decoder)
    while not isinstance(text, PreTrainedModel):
        decoder = decoder.rpartition(".")[0]
        text = model.get_submodule(decoder)
    before = text.config._attn_implementation
    name = f"{PREFIX}{before}"
    _register(name, before)
    text.set_attn_implementation(name)
    if text.config._attn_implementation != name:
        raise UserError(
            f"{type(text).__name__} does not let its attention be exchanged, so attention weights cannot be summed. "
            "For learners use router='hidden' or router='none'; a diagnosis of attention needs another model class."
        )
    return lambda: text.set_attn_implementation(before)


@contextmanager
def carrying_columns(model: nn.Module, *, decoder: str) -> Iterator[None]:
    """`carry_columns` inside the block."""
    undo = carry_columns(model, decoder=decoder)
    try:
        yield
    finally:
        undo()


def _register(name: str, before: str) -> None:
    """Makes ``columns_<before>`` known: the same attention and the same mask, with columns."""
    masks = AttentionMaskInterface()
    AttentionInterface.register(name, _with_columns(before))
    AttentionMaskInterface.register(name, masks[before])


def _with_columns(before: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    own = AttentionInterface()

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        columns, apart = kwargs.pop(KEYWORD, None), kwargs.pop(APART, False)
        # Every modeling file has its own eager attention beside the module.
        call = own[before] if before in own else sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
        if columns is None:
            return call(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("scaling") is None:
            kwargs["scaling"] = query.shape[-1] ** -0.5
        beside = fit(columns, value)
        if apart:
            out, _ = call(module, query, key, value, attention_mask, **kwargs)
            sums, _ = call(module, query, key, functional.pad(beside, (0, value.shape[-1] - WIDTH)), attention_mask, **kwargs)
            return out, sums[..., : columns.shape[-1]].sum(dim=2)
        wide = torch.cat([value, beside], dim=-1)
        query, key = functional.pad(query, (0, WIDTH)), functional.pad(key, (0, WIDTH))
        out, _ = call(module, query, key, wide, attention_mask, **kwargs)
        dim = value.shape[-1]
        return out[..., :dim], out[..., dim : dim + columns.shape[-1]].sum(dim=2)

    return attend


def fit(columns: Float[Tensor, "batch keys columns"], value: Float[Tensor, "batch heads cached dim"]) -> Tensor:
    """`columns` for the keys that a layer really attends to, one copy per key head, `WIDTH` wide.

    A sliding window keeps the last keys only, a static cache has room for more.
    """
    batch, heads, cached, _ = value.shape
    assert columns.shape[-1] <= WIDTH, f"{columns.shape[-1]} columns came, {WIDTH} fit"
    found = columns[:, -cached:]
    padded = functional.pad(found, (0, WIDTH - found.shape[-1], 0, cached - found.shape[1]))
    return padded.to(value.dtype).unsqueeze(1).expand(batch, heads, cached, WIDTH)
