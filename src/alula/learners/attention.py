"""The mixture around one decoder layer's attention: host + learners + router."""

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache

from alula.context import PerThread
from alula.errors import UserError
from alula.experts.lorra import LoRRA, Rotate
from alula.learners import columns
from alula.learners.features import KEYWORD, TEXT, Features, image_ends, kept
from alula.models.graph import with_parameters
from alula.routers.learner import LearnerRouter

MODALITIES = ("image", "text")
"""The order of learners among a router's classes, as published: visual first."""


@dataclass(frozen=True)
class Call:
    """What the host's attention was called with and what it gave, as far as learners need it."""

    features: Features
    rotary: tuple[Tensor, Tensor] | None
    cache: Cache | None
    sums: Tensor | None


class Late(PerThread):
    """A call between the attention and the norm behind it."""

    call: Call | None = None


class AttentionMixture(nn.Module):
    """``h + w_V Learner_V(h, x_V) + w_T Learner_T(h, x_T)`` with ``h = residual + attention``, in place of attention.

    Args:
        host: the layer's attention; its rotary embedding and key positions are the learners', too.
        learners: by modality.
        router: weights over them; a lone learner under a router without "neither" has weight 1.
        joins_late: the host's output is normalised before it joins the residual stream (Gemma 3), so the learners are
            added by a hook on that norm.
        factor: what the layer multiplies the host's output with when it joins (Granite).
        strict_text: rows without an image are left bit for bit as the host has them.
        reference: the arithmetic of the official code: both outputs are added twice, and a text feature's place among the
            features counts as its position, so the textual learner sees some of the future.
        causal_images: a token sees only images that ended before it, or with it. The paper has no such rule; without it an
            answer given before an image is trained with a view of that image.
        text_start: so many first text tokens of a row (the system prompt) are no features.

    Source: Zhang et al. 2024, "Wings", equation 5 (arXiv 2406.03496).
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        index: int,
        learners: dict[str, LoRRA],
        router: LearnerRouter,
        joins_late: bool,
        factor: float,
        strict_text: bool,
        reference: bool,
        causal_images: bool,
        text_start: int,
    ) -> None:
        super().__init__()
        self.host, self.index, self.router = host, index, router
        self.learners = nn.ModuleDict(learners)
        self.joins_late, self.factor, self.strict_text, self.reference = joins_late, factor, strict_text, reference
        self.causal_images, self.text_start = causal_images, text_start
        self.late = Late()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's output with the learners' part in it; what the batch leaves out is in its graph all the same."""
        out = self._forward(*args, **kwargs)
        if not torch.is_grad_enabled():
            return out
        return (with_parameters(out[0], [*self.learners.parameters(), *self.router.parameters()]), *out[1:])

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if KEYWORD not in kwargs:
            raise UserError(
                f"The attention of layer {self.index} was called without its keyword, so the learners cannot tell image from text. "
                "Call the model that `attach_learners` was given, not a part of it (the `generate` of BLIP-2 does so), or `detach` first."
            )
        features: Features | None = kwargs.pop(KEYWORD)
        if features is None:
            self.late.call = None
            return self.host(*args, **kwargs)
        cache = kwargs.get("past_key_values")
        marks = features.all_marks(cache)
        if self._is_silent(features):
            self._keep(features, kwargs, cache)
            self.late.call = None
            return self.host(*args, **kwargs)
        wanted = self.router.columns(marks, features.up_to(marks.sum(dim=-1)) - 1) if features.is_routed else None
        if wanted is not None and not features.shows_weights:
            kwargs |= {columns.KEYWORD: wanted, columns.APART: self.strict_text and not features.memo.all_image}
        out = self.host(*args, **kwargs)
        call = Call(features, kwargs.get("position_embeddings"), cache, self._sums(out[1], wanted, features))
        if self.joins_late:
            self.late.call = call
            return out
        joined = features.memo.residual[self.index] + self.factor * out[0]
        return (self._add(out[0], self.added(joined, call) / self.factor, call), *out[1:])

    def _sums(self, second: Tensor | None, wanted: Tensor | None, features: Features) -> Tensor | None:
        """The router's sums, which stand in the second place of the host's output unless its weights do."""
        if wanted is None or not features.shows_weights:
            return second if wanted is not None else None
        if second is None:
            raise UserError(
                "`output_attentions=True` wants attention weights, and this model's attention never has them in memory. Detach, "
                "call `model.set_attn_implementation('eager')` and attach again, or leave `output_attentions` out."
            )
        return columns.summed(second, wanted)

    def join(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        """The hook on the norm behind the attention, where the host's output joins the residual stream late."""
        call, self.late.call = self.late.call, None
        if call is None:
            return out
        joined = call.features.memo.residual[self.index] + out
        return self._add(out, self.added(joined, call), call)

    def _add(self, out: Tensor, added: Tensor, call: Call) -> Tensor:
        added = added.to(out.dtype)
        if not self.strict_text:
            return out + added
        return torch.where(call.features.with_image(call.cache).unsqueeze(-1), out + added, out)

    def _speaking(self, features: Features) -> list[str]:
        return [name for name in MODALITIES if name in self.learners and name in features.modalities]

    def _is_silent(self, features: Features) -> bool:
        speaking = self._speaking(features)
        return not features.memo.any_image and (self.strict_text or "text" not in speaking)

    def added(self, hidden: Float[Tensor, "batch tokens dim"], call: Call) -> Float[Tensor, "batch tokens dim"]:
        """The routed sum of what the learners say to `hidden`."""
        features, marks = call.features, call.features.all_marks(call.cache)
        present = self._present(call, marks, tokens=hidden.shape[1])
        said, active = [], []
        for name in MODALITIES:
            if name not in self.learners:
                continue
            speaks = name in features.modalities
            active.append(present[name] & speaks)
            said.append(self._text(hidden, call, marks) if name == "text" and speaks else None)
            if name == "image" and speaks:
                said[-1] = self._image(hidden, call, marks)
        while len(active) < self.router.classes:
            active.append(torch.ones_like(active[0]))
        chosen = torch.stack(active, dim=-1)
        weights = self.router(hidden, call.sums, active=chosen) if features.is_routed else chosen.float()
        parts = [weights[..., index : index + 1].to(part.dtype) * part for index, part in enumerate(said) if part is not None]
        total = sum(parts[1:], start=parts[0]) if parts else torch.zeros_like(hidden)
        return 2 * total if self.reference else total

    def _present(self, call: Call, marks: Float[Tensor, "batch keys 2"], *, tokens: int) -> dict[str, Tensor]:
        """Per token, whether there is a feature that it may see."""
        features, image = call.features, call.features.with_image(call.cache)
        is_feature = self._text_counts(features, marks) > 0
        text = is_feature[:, -tokens:]
        if self.reference:
            is_feature = is_feature & (marks[..., TEXT] > 0)
            text = (self._text_mask(features, marks, tokens=tokens)[:, 0] & is_feature[:, None, :]).any(dim=-1)
        if self.causal_images:
            image = features.up_to(image_ends(marks, documents=features.documents))[:, -tokens:] > 0
        return {"text": text, "image": image}

    def _text_counts(self, features: Features, marks: Float[Tensor, "batch keys 2"]) -> Int[Tensor, "batch keys"]:
        """How many text features there are up to each token; not positive in the system prompt."""
        return features.up_to(marks[..., TEXT]) - self.text_start

    def _rotate(self, rotary: tuple[Tensor, ...] | None) -> Rotate:
        if rotary is None:
            return lambda heads: heads
        apply = sys.modules[type(self._attention()).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
        if "k" not in inspect.signature(apply).parameters:  # Gemma 4 turns one at a time
            return lambda heads: apply(heads, *rotary)
        return lambda heads: apply(heads, heads[:, :1], *rotary)[0]  # it turns queries and keys, here one key head for nothing

    def _attention(self) -> nn.Module:
        """The host without what may be wrapped around it."""
        inner = self.host
        while isinstance(wrapped := getattr(inner, "host", None), nn.Module):
            inner = wrapped
        return inner

    def _keep(self, features: Features, kwargs: dict[str, Any], cache: Cache | None) -> None:
        """A silent layer keeps its features all the same: a later turn of the conversation may bring an image."""
        if cache is not None and "text" in self._speaking(features):
            self._text_features(Call(features, kwargs.get("position_embeddings"), cache, None))

    def _text_features(self, call: Call) -> tuple[Tensor, Tensor]:
        """The text keys and values of the whole sequence up to now; image tokens and padding are blocked."""
        features, learner = call.features, self.learners["text"]
        assert isinstance(learner, LoRRA) and features.memo.layer0 is not None
        valid = features.marks[..., TEXT] > 0
        if self.text_start:
            valid = valid & (self._text_counts(features, features.all_marks(call.cache))[:, -valid.shape[1] :] > 0)
        keys, values = learner.keys_values(features.memo.layer0, valid=valid, rotate=self._rotate(call.rotary))
        return self._cached(keys, values, call, place=1)

    def _text(self, hidden: Tensor, call: Call, marks: Tensor) -> Tensor:
        keys, values = self._text_features(call)
        learner, tokens = self.learners["text"], hidden.shape[1]
        plain = call.features.documents is None and not self.reference
        whole = keys.shape[2] == tokens
        mask = None if plain and (whole or tokens == 1) else self._text_mask(call.features, marks, tokens=tokens)
        return learner(hidden, keys, values, rotate=self._rotate(call.rotary), causal=whole and mask is None, mask=mask)

    def _text_mask(self, features: Features, marks: Tensor, *, tokens: int) -> Tensor:
        """Causal by true position, within a document; in the official arithmetic by place among the features."""
        place = torch.arange(marks.shape[1], device=marks.device).expand(marks.shape[:2])
        query = place
        if self.reference:
            place, query = self._text_counts(features, marks) - 1, features.up_to(marks.sum(dim=-1)) - 1
        mask = place[:, None, :] <= query[:, -tokens:, None]
        if features.documents is not None:
            mask = mask & features.same_document()
        return mask.unsqueeze(1)

    def _image(self, hidden: Tensor, call: Call, marks: Tensor) -> Tensor | None:
        features, learner, layer0 = call.features, self.learners["image"], call.features.memo.layer0
        assert isinstance(learner, LoRRA) and layer0 is not None
        found, mask = features.images(), None
        if found is None:
            stored = kept(call.cache, num_layers=features.num_layers)[2 + 2 * self.index] if call.cache is not None else None
            if stored is None or stored.keys is None:
                return None
            keys, values = stored.keys, stored.values
        else:
            order, valid = found
            rows = torch.arange(len(order), device=order.device)[:, None]
            rotary = (
                None
                if call.rotary is None
                else tuple(turn.expand(*turn.shape[:-3], len(order), *turn.shape[-2:])[..., rows, order, :] for turn in call.rotary)
            )
            keys, values = learner.keys_values(layer0[rows, order], valid=valid, rotate=self._rotate(rotary))
            mask = self._image_mask(features, order)
            keys, values = self._cached(keys, values, call, place=2)
            if mask is not None:
                mask = functional.pad(mask, (keys.shape[2] - mask.shape[-1], 0), value=True)  # earlier images of the cache
                mask = mask | ~mask.any(dim=-1, keepdim=True)  # a token without any key is taken out by its weight
        return learner(hidden, keys, values, rotate=self._rotate(call.rotary), mask=mask)

    def _image_mask(self, features: Features, order: Tensor) -> Tensor | None:
        """Which of this forward's image tokens a token may see: those of its document, those that ended before it."""
        tokens = features.marks.shape[1]
        mask = features.marks.new_ones(len(order), tokens, order.shape[1], dtype=torch.bool)
        if features.documents is None and not self.causal_images:
            return None
        if features.documents is not None:
            mask = mask & features.same_document().gather(2, order[:, None, :].expand(-1, tokens, -1))
        if self.causal_images:
            ends = image_ends(features.marks, documents=features.documents)
            begun = ends.cumsum(dim=1)
            # an image token that is no end has as many images before it as when it is not over
            over = begun.gather(1, order) + (~ends).gather(1, order).long()
            mask = mask & (begun[:, :, None] >= over[:, None, :])
        return mask.unsqueeze(1)

    def _cached(self, keys: Tensor, values: Tensor, call: Call, *, place: int) -> tuple[Tensor, Tensor]:
        """With those of earlier forwards of this generation."""
        if call.cache is None:
            return keys, values
        return kept(call.cache, num_layers=call.features.num_layers)[place + 2 * self.index].update(keys, values)


def joining_norm(layer: nn.Module) -> str | None:
    """The name of the norm that a decoder layer lays on its attention's output before that joins the residual stream."""
    if hasattr(layer, "post_self_attn_layernorm"):  # GLM 4
        return "post_self_attn_layernorm"
    return "post_attention_layernorm" if hasattr(layer, "post_feedforward_layernorm") else None  # Gemma 2 and 3, OLMo 2, EXAONE 4
