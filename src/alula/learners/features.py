"""What learners may see in one forward, and what they keep with a generation's cache. It knows no learner and no router."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicLayer

from alula.errors import UserError
from alula.experts.lorra import BIAS_COLUMNS, BLOCKED

KEYWORD = "alula_features"
TEXT, IMAGE = 0, 1
"""Columns of the marks."""


class MarkLayer(DynamicLayer):
    """The marks of all tokens of a generation: the first of the learners' layers in its cache."""


class FeatureLayer(DynamicLayer):
    """Keys and values of image features, kept among a cache's own layers: reordered, repeated and selected with them.

    Args:
        marks: the layer that keeps the marks; it stands before this one, so it is cropped first.
    """

    def __init__(self, marks: DynamicLayer) -> None:
        super().__init__()
        self.marks = marks

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Taking back text leaves the features; those of images that are taken back are blocked."""
        if self.keys is None or self.marks.keys is None:
            return
        valid = self.keys[:, 0, :, -1] == 0
        gone = valid & (valid.cumsum(dim=1) > self.marks.keys[:, 0, :, IMAGE].sum(dim=1, keepdim=True))
        if bool(gone.any()):
            bias = self.keys[..., -BIAS_COLUMNS:].masked_fill(gone[:, None, :, None], BLOCKED)
            self.keys = torch.cat([self.keys[..., :-BIAS_COLUMNS], bias], dim=-1)


@dataclass(frozen=True, kw_only=True)
class Features:
    """One forward's knowledge; it travels to the attention modules as a keyword.

    Attributes:
        marks: per token whether it is text and whether it is image; both zero for padding.
        documents: which packed document a token belongs to; None: one per row.
        modalities: the learners that speak.
        is_routed: False: each of them with weight 1.
        shows_weights: the caller asked for attention weights, so the host's own must come out.
    """

    marks: Float[Tensor, "batch tokens 2"]
    documents: Int[Tensor, "batch tokens"] | None
    modalities: tuple[str, ...]
    is_routed: bool
    num_layers: int
    shows_weights: bool = False
    memo: "Memo" = field(default_factory=lambda: Memo())

    def all_marks(self, cache: Cache | None) -> Float[Tensor, "batch keys 2"]:
        """The marks of the whole sequence up to now, those of earlier forwards from the cache."""
        if self.memo.marks is None:
            if cache is None:
                self.memo.marks = self.marks
            else:
                column = self.marks.unsqueeze(1)
                self.memo.marks = kept(cache, num_layers=self.num_layers)[0].update(column, column)[0].squeeze(1)
            image = self.memo.marks[..., IMAGE] > 0
            if self.documents is None:
                self.memo.with_image = image.any(dim=1, keepdim=True).expand(self.marks.shape[:2])
            else:
                self.memo.with_image = (self.same_document() & image[:, None, :]).any(dim=-1)
            self.memo.any_image, self.memo.all_image = bool(self.memo.with_image.any()), bool(self.memo.with_image.all())
        return self.memo.marks

    def with_image(self, cache: Cache | None) -> Bool[Tensor, "batch tokens"]:
        """Whether there is an image in a token's row, or in its packed document."""
        self.all_marks(cache)
        assert self.memo.with_image is not None
        return self.memo.with_image

    def up_to(self, flags: Tensor) -> Int[Tensor, "batch keys"]:
        """How many `flags` (batch x keys) there are up to each token, itself included; counted anew in each document."""
        total = flags.long().cumsum(dim=1)
        if self.documents is None:
            return total
        is_first = functional.pad(self.documents.diff(dim=1) != 0, (1, 0), value=True)
        return total - ((total - flags.long()) * is_first).cummax(dim=1).values

    def same_document(self) -> Bool[Tensor, "batch tokens tokens"]:
        """Which pairs of this forward's tokens belong to one packed document."""
        assert self.documents is not None, "asked only where rows are packed"
        return self.documents[:, :, None] == self.documents[:, None, :]

    def images(self) -> tuple[Int[Tensor, "batch images"], Bool[Tensor, "batch images"]] | None:
        """Where this forward's image tokens are, as indices padded to the longest row, and which are no padding."""
        if self.memo.order is None:
            found = self.marks[..., IMAGE] > 0
            longest = int(found.sum(dim=1).max())
            order = (~found).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
            self.memo.order = (order, found.gather(1, order))
        return self.memo.order if self.memo.order[0].shape[1] else None


@dataclass
class Memo:
    """What is computed once per forward and used by all its layers.

    Attributes:
        layer0: what went into the first decoder layer: the features of both modalities.
        residual: what went into each decoder layer.
        with_image: whether there is an image in a token's row or document.
        any_image, all_image: whether that holds for one of the tokens, or for each of them.
    """

    layer0: Tensor | None = None
    residual: dict[int, Tensor] = field(default_factory=dict)
    marks: Tensor | None = None
    with_image: Tensor | None = None
    any_image: bool = False
    all_image: bool = False
    order: tuple[Tensor, Tensor] | None = None


def kept(cache: Cache, *, num_layers: int) -> Sequence[Any]:
    """The learners' layers of a cache, after the model's own: marks first, then text and image of each decoder layer.

    Living inside the cache they follow it through beam search, batch selection, cropping and copying.
    """
    if _marks(cache, num_layers=num_layers) is None:
        make = cache.layer_class_to_replicate
        while len(cache.layers) < num_layers and make is not None:
            cache.layers.append(make())
        marks = MarkLayer()
        cache.layers.append(marks)
        for _ in range(num_layers):
            cache.layers.extend((DynamicLayer(), FeatureLayer(marks)))
    return cache.layers[-1 - 2 * num_layers :]


def _marks(cache: Cache, *, num_layers: int) -> MarkLayer | None:
    """The learners' first layer; the model's own before it may be fewer than its decoder's, where decoder layers share one."""
    first = len(cache.layers) - 1 - 2 * num_layers
    found = cache.layers[first] if first >= 0 else None
    return found if isinstance(found, MarkLayer) else None


def num_seen(cache: Cache | None, *, num_layers: int) -> int:
    """The tokens in a cache.

    Raises:
        UserError: some of them never came by the learners, so nobody knows which are image tokens.
    """
    if cache is None:
        return 0
    there = int(cache.get_seq_length())
    marks = _marks(cache, num_layers=num_layers)
    known = marks.get_seq_length() if marks is not None else 0
    if there != known:
        raise UserError(
            f"This cache holds {there} tokens, but the learners saw {known} of them, so they cannot tell image from text in it. "
            "Start the generation anew with the learners attached and speaking."
        )
    return there


def valid_tokens(attention_mask: Any, ids: Int[Tensor, "batch tokens"], *, seen: int) -> Bool[Tensor, "batch tokens"]:
    """Which of a call's tokens are no padding.

    Args:
        attention_mask: None, one of two axes, or finished ones of four axes (generation with a static cache makes them, by
            layer type): there a token that does not see itself is padding.
        seen: tokens of earlier forwards.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    if not isinstance(attention_mask, Tensor):
        return torch.ones_like(ids, dtype=torch.bool)
    if attention_mask.dim() == 2:
        return attention_mask[:, -ids.shape[1] :].bool()
    own = attention_mask[:, 0].diagonal(offset=seen, dim1=-2, dim2=-1)
    return (own if own.dtype == torch.bool else own == 0).expand(ids.shape)


def image_ends(marks: Float[Tensor, "batch keys 2"], *, documents: Int[Tensor, "batch keys"] | None = None) -> Bool[Tensor, "batch keys"]:
    """True at the last token of each image; images of a document without a token between them count as one."""
    image = marks[..., IMAGE] > 0
    goes_on = image[:, 1:] if documents is None else image[:, 1:] & (documents.diff(dim=1) == 0)
    return image & ~functional.pad(goes_on, (0, 1))


def documents_of(position_ids: Tensor | None, valid: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"] | None:
    """Which packed document each token belongs to, told by positions that start anew; None where there is one per row."""
    if position_ids is not None and position_ids.dim() == 3 and len(position_ids) == 4:
        position_ids = position_ids[0]  # Qwen-VL: the text's own positions, then those of the rotary embedding's three axes
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != valid.shape[1]:
        return None
    before = functional.pad(position_ids[:, :-1], (1, 0))
    starts = (position_ids != before + 1) & valid & (valid.cumsum(dim=1) > 1)
    return starts.long().cumsum(dim=1) if bool(starts.any()) else None
