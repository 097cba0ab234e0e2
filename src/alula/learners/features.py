"""What learners may see in one forward, and what they keep with a generation's cache. It knows no learner and no router."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import Cache, DynamicLayer

KEYWORD = "alula_features"
TEXT, IMAGE = 0, 1
"""Columns of the marks."""


class FeatureLayer(DynamicLayer):
    """Keys and values of features, kept among a cache's own layers: reordered, repeated and selected with them."""

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Features belong to the prompt: taking back generated tokens leaves them."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """One forward's knowledge; it travels to the attention modules as a keyword.

    Attributes:
        marks: per token whether it is text and whether it is image; both zero for padding.
        documents: which packed document a token belongs to; None: one per row.
        modalities: the learners that speak.
        is_routed: False: each of them with weight 1.
    """

    marks: Float[Tensor, "batch tokens 2"]
    documents: Int[Tensor, "batch tokens"] | None
    modalities: tuple[str, ...]
    is_routed: bool
    num_layers: int
    memo: "Memo" = field(default_factory=lambda: Memo())

    def all_marks(self, cache: Cache | None) -> Float[Tensor, "batch keys 2"]:
        """The marks of the whole sequence up to now, those of earlier forwards from the cache."""
        if self.memo.marks is None:
            if cache is None:
                self.memo.marks = self.marks
            else:
                column = self.marks.unsqueeze(1)
                self.memo.marks = kept(cache, num_layers=self.num_layers)[0].update(column, column)[0].squeeze(1)
            rows = self.memo.marks[..., IMAGE].any(dim=1)
            self.memo.any_image, self.memo.all_image = bool(rows.any()), bool(rows.all())
        return self.memo.marks

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
        any_image, all_image: whether one of the rows, or each of them, has an image.
    """

    layer0: Tensor | None = None
    residual: dict[int, Tensor] = field(default_factory=dict)
    marks: Tensor | None = None
    any_image: bool = False
    all_image: bool = False
    order: tuple[Tensor, Tensor] | None = None


def kept(cache: Cache, *, num_layers: int) -> Sequence[Any]:
    """The learners' layers of a cache, after the model's own: marks first, then text and image of each decoder layer.

    Living inside the cache they follow it through beam search, batch selection, cropping and copying.
    """
    make = cache.layer_class_to_replicate
    while len(cache.layers) < num_layers and make is not None:
        cache.layers.append(make())
    if len(cache.layers) == num_layers:
        cache.layers.append(DynamicLayer())
        for _ in range(num_layers):
            cache.layers.extend((DynamicLayer(), FeatureLayer()))
    return cache.layers[num_layers:]


def image_ends(marks: Float[Tensor, "batch keys 2"]) -> Bool[Tensor, "batch keys"]:
    """True at the last token of each image; images without a token between them count as one."""
    image = marks[..., IMAGE] > 0
    return image & ~functional.pad(image[:, 1:], (0, 1))


def documents_of(position_ids: Tensor | None, valid: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch tokens"] | None:
    """Which packed document each token belongs to, told by positions that start anew; None where there is one per row."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != valid.shape[1]:
        return None
    before = functional.pad(position_ids[:, :-1], (1, 0))
    starts = (position_ids != before + 1) & valid & (valid.cumsum(dim=1) > 1)
    return starts.long().cumsum(dim=1) if bool(starts.any()) else None
