"""Extra value columns: what attention weights sum to over groups of keys, at full speed.

For any matrix C of one row per key, ``softmax(q k^T) C`` is what fused attention computes if C stands beside the values.
So a sum of attention weights, over image tokens or with one weight per position, needs no weights in memory. It knows no
learner and no router.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from alula.mixture.exchange import Attention, exchange_attention, named_attention

KEYWORD = "alula_columns"
APART = "alula_columns_apart"
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
    return exchange_attention(
        model,
        decoder=decoder,
        name="columns",
        around=_with_columns,
        otherwise="so attention weights cannot be summed. For learners use router='hidden' or router='none'; a diagnosis of "
        "attention needs another model class.",
    )


@contextmanager
def carrying_columns(model: nn.Module, *, decoder: str) -> Iterator[None]:
    """`carry_columns` inside the block."""
    undo = carry_columns(model, decoder=decoder)
    try:
        yield
    finally:
        undo()


def summed(
    weights: Float[Tensor, "batch heads tokens cached"], columns: Float[Tensor, "batch keys columns"]
) -> Float[Tensor, "batch tokens columns"]:
    """What `columns` sum to over heads and keys, by weights that are in memory."""
    return weights.sum(dim=1) @ _of_cached(columns, weights.shape[-1]).to(weights.dtype)


def _with_columns(before: str) -> Attention:
    call = named_attention(before)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        columns, apart = kwargs.pop(KEYWORD, None), kwargs.pop(APART, False)
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
    """`columns` for the keys that a layer really attends to, one copy per key head, `WIDTH` wide."""
    batch, heads, cached, _ = value.shape
    assert columns.shape[-1] <= WIDTH, f"{columns.shape[-1]} columns came, {WIDTH} fit"
    padded = functional.pad(_of_cached(columns, cached), (0, WIDTH - columns.shape[-1]))
    return padded.to(value.dtype).unsqueeze(1).expand(batch, heads, cached, WIDTH)


def _of_cached(columns: Float[Tensor, "batch keys columns"], cached: int) -> Float[Tensor, "batch cached columns"]:
    """A sliding window keeps the last keys only, a static cache has room for more."""
    found = columns[:, -cached:]
    return functional.pad(found, (0, 0, 0, cached - found.shape[1]))
