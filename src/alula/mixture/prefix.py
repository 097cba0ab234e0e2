"""Learnt keys and values in front of each decoder layer's own: prefixes, laid under the attention that the model has.

The seam is Transformers' attention interface: an attention of our own name puts the prefix before keys and values, widens
the mask, and calls the model's former attention. Nothing of the prefix enters a cache, a mask or a position outside of
that call, so images and cached decoding stay what they are. It knows no method.

The prefix stands at a fixed place, so the prompt's absolute positions matter: a forward of one's own over a left-padded
batch must bring ``position_ids``, as `generate` does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from alula.errors import UserError
from alula.mixture.exchange import Attention, exchange_attention, named_attention
from alula.models.anatomy import anatomy

CHILD = "prefix"
"""Under this name an attention module holds its `LearntPrefix`."""

ORIGINALS = ("sdpa", "eager")
"""Attentions with a mask that can be widened."""


class LearntPrefix(nn.Module):
    """Keys and values that every token of one attention module sees, without a position: they are never rotated.

    Attributes:
        speaks: False: it gives back what it gets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(0))
        self.values = nn.Parameter(torch.empty(0))
        self.speaks = False

    def grow(self, num_virtual_tokens: int, *, key: Tensor, value: Tensor) -> None:
        """Zeros in the form of an attention's `key` and `value` (batch x heads x tokens x dim), in fp32 at least."""
        self.keys, self.values = (
            nn.Parameter(
                like.new_zeros(like.shape[1], num_virtual_tokens, like.shape[3], dtype=torch.promote_types(like.dtype, torch.float32))
            )
            for like in (key, value)
        )

    def forward(
        self, key: Float[Tensor, "batch heads tokens dim"], value: Float[Tensor, "batch heads tokens width"]
    ) -> tuple[Float[Tensor, "batch heads more dim"], Float[Tensor, "batch heads more width"]]:
        """Keys and values with the prefix before them."""
        if not self.speaks:
            return key, value
        batch = key.shape[0]
        keys, values = self.keys.to(key.dtype).expand(batch, -1, -1, -1), self.values.to(value.dtype).expand(batch, -1, -1, -1)
        return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)


class Prefixes:
    """The prefixes of one model. Made by `attach_prefixes`; until `speak` is called the model computes what it always did.

    Attributes:
        sites: each prefix by the path of its attention module.
        num_filled: virtual tokens that `fill` has given values.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, LearntPrefix], *, num_virtual_tokens: int) -> None:
        self.model, self.sites = model, dict(sites)
        self.num_virtual_tokens, self.num_filled = num_virtual_tokens, 0

    def speak(self) -> None:
        """From now on the model sees its prefixes."""
        for prefix in self.sites.values():
            prefix.speaks = True

    def train(self) -> None:
        """Of the whole model, only the prefixes train."""
        self.model.requires_grad_(False)
        for prefix in self.sites.values():
            prefix.requires_grad_(True)

    @torch.no_grad()
    def fill(self, inputs: Mapping[str, Tensor]) -> None:
        """Gives virtual tokens that have no values yet the activations of the tokens of `inputs`, row by row."""
        wanted = self.num_virtual_tokens - self.num_filled
        if wanted == 0:
            return
        valid = inputs["attention_mask"].bool()
        seen = watch(self.model, self.sites, {key: value for key, value in inputs.items() if key != "labels"})
        count = min(wanted, int(valid.sum()))
        place = slice(self.num_filled, self.num_filled + count)
        for path, (key, value) in seen.items():
            self.sites[path].keys[:, place] = key.transpose(1, 2)[valid][:count].transpose(0, 1)
            self.sites[path].values[:, place] = value.transpose(1, 2)[valid][:count].transpose(0, 1)
        self.num_filled += count


def attach_prefixes(model: nn.Module, *, num_virtual_tokens: int) -> Prefixes:
    """Gives every decoder layer with softmax attention a prefix, silent until `Prefixes.speak`.

    Args:
        num_virtual_tokens: learnt keys and values per layer (1 or more).

    Raises:
        UserError: fewer than one virtual token, or an attention that cannot be exchanged.
    """
    if num_virtual_tokens < 1:
        raise UserError(f"num_virtual_tokens: {num_virtual_tokens} came; 1 or more is accepted. Choose a number such as 10.")
    parts = anatomy(model)
    exchange_attention(
        model, decoder=parts.decoder, name="prefix", around=_with_prefix, otherwise="so it can have no prefix. Use a LoRA method."
    )
    model.requires_grad_(False)
    candidates = {path: LearntPrefix() for path in parts.attention}
    for path, prefix in candidates.items():
        model.get_submodule(path).add_module(CHILD, prefix)
    # The shapes are in no configuration under one name (heads may differ by layer, values be narrower): one token tells.
    token = next(index for index in range(2) if index != parts.image_token_id)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        seen = watch(model, candidates, {"input_ids": torch.full((1, 1), token, device=next(model.parameters()).device)})
    if not seen:
        raise UserError(f"No attention of {type(model).__name__} could be given a prefix: none is called by name. Use a LoRA method.")
    for path, prefix in candidates.items():
        if path in seen:
            prefix.grow(num_virtual_tokens, key=seen[path][0], value=seen[path][1])
        else:  # linear attention, or cross-attention: there are no keys of its own tokens
            delattr(model.get_submodule(path), CHILD)
    return Prefixes(model, {path: candidates[path] for path in seen}, num_virtual_tokens=num_virtual_tokens)


def watch(model: nn.Module, sites: Mapping[str, LearntPrefix], inputs: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The keys and values that reached each of `sites` in one forward; those that none reached are left out."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def catch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, Tensor], output: Any) -> None:
            seen[path] = args

        return hook

    hooks = [prefix.register_forward_hook(catch(path)) for path, prefix in sites.items()]
    try:
        model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _with_prefix(before: str) -> Attention:
    if before not in ORIGINALS:
        raise UserError(
            f"Prefixes cannot be laid under the attention '{before}'. Accepted: {', '.join(ORIGINALS)}. Load the model with one."
        )
    call = named_attention(before)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        prefix = getattr(module, CHILD, None)
        if isinstance(prefix, LearntPrefix):
            longer, value = prefix(key, value)
            is_causal = kwargs.get("is_causal", getattr(module, "is_causal", True)) and before == "sdpa"
            attention_mask = _widen(attention_mask, query=query, key=key, more=longer.shape[2] - key.shape[2], is_causal=is_causal)
            key = longer
        return call(module, query, key, value, attention_mask, **kwargs)

    return attend


def _widen(mask: Tensor | None, *, query: Tensor, key: Tensor, more: int, is_causal: bool) -> Tensor | None:
    """`mask` (batch x 1 x queries x keys) with `more` keys before the others that every query sees.

    Without a mask the attention would go by ``is_causal``, whose triangle would end too early.
    """
    if more == 0:
        return mask
    if mask is None:
        if query.shape[2] == 1 or not is_causal:
            return None
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    return functional.pad(mask, (more, 0), value=True if mask.dtype == torch.bool else 0.0)
