"""Attention shift: does text after an image still get attention, layer by layer, as text before it does?

The diagnosis MLLM-LAWS, for any model that has its images among its tokens. Sums of attention weights come out of fused
attention as extra value columns (`alula.learners.columns`), so no tokens x tokens matrix is ever kept. It knows no method
and writes no file.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from alula.data.sample import Sample
from alula.errors import UserError
from alula.evaluation.bootstrap import Interval, bootstrap_interval
from alula.evaluation.generation import Around, Batch, BatchMaker, on_device, untouched
from alula.learners.columns import KEYWORD, WIDTH, carrying_columns
from alula.mixture.prefix import LearntPrefix
from alula.models.anatomy import Anatomy, anatomy, base_model
from alula.models.logits import keeping

SEGMENTS = ("before", "itself", "between", "after")
"""Of the keys: text before the first image token, image tokens, other tokens among them, text after the last one."""

NO_IMAGE, NO_TEXT_AFTER, CONSTANT = "no image", "no text after the image", "constant curve"
"""Why a sample has no attention shift."""

WEIGHTED = ("self_attn", "attn", "attention", "self_attention")
"""The names of token mixers with a softmax over keys; linear attention and convolutions have no weights to sum."""

FLAT = 1e-6
"""The standard deviation (of shares, 0-1) below which a curve is constant: the rounding of fp32 attention."""


@dataclass(frozen=True, kw_only=True)
class AttentionShift:
    """What `diagnose` found.

    Attributes:
        layers: the decoder layers that were measured.
        curves: for each of `SEGMENTS`, the share (0-1) of attention at each layer, mean over the samples that were measured.
        ids: of all samples that came.
        shifts: the attention shift (0-2) of each of them; NaN where it was left out.
        left_out: how many samples have none, by reason. Those with a constant curve count in `curves`, the others do not.
    """

    layers: tuple[int, ...]
    curves: dict[str, tuple[float, ...]]
    ids: tuple[str, ...]
    shifts: tuple[float, ...]
    left_out: dict[str, int]

    @property
    def known(self) -> list[float]:
        """The shifts of the samples that have one."""
        return [shift for shift in self.shifts if np.isfinite(shift)]

    @property
    def shift(self) -> float:
        """The mean over samples; NaN where none has one."""
        return float(np.mean(self.known)) if self.known else float("nan")

    @property
    def interval(self) -> Interval | None:
        """The 95 % bootstrap interval of the mean, over samples."""
        return bootstrap_interval(self.known)

    def row(self, **labels: object) -> dict[str, Any]:
        """The entry of ``attention_shift.json``, after `labels`; what is not known is null."""
        interval = self.interval
        return {
            **labels,
            "layers": list(self.layers),
            "curves": {name: list(curve) for name, curve in self.curves.items()},
            "shift": self.shift if self.known else None,
            "interval": [interval.low, interval.high] if interval else None,
            "n": len(self.known),
            "left_out": dict(self.left_out),
            "ids": list(self.ids),
            "shifts": [shift if np.isfinite(shift) else None for shift in self.shifts],
        }


def diagnose(
    model: nn.Module,
    collator: BatchMaker,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    around: Around = untouched,
    progress: Callable[[int, int], None] | None = None,
) -> AttentionShift:
    """The attention shift of a model on whole conversations, answers included.

    A sample's shift is ``1 - rho`` of its before and after curves (Pearson, over layers): 0 where text after the image is
    attended like text before it, 2 where the opposite. A constant curve has no correlation, such as that of a chat
    template which puts nothing before the image; such a sample is left out of the mean and counted.

    Compare models, do not read a single number: a row's first token, on which many models rest unused attention, counts as
    text before the image, so that the level depends on the model and its chat template.

    Args:
        batch_size: samples in one forward.
        around: gives a context for each batch, entered around the forward (a pool's ``mixtures.director.on_prompts``).
        progress: called with the samples done and the samples in all, after each batch.

    Raises:
        UserError: no sample has an image with text after it, or as in `attention_shares`.

    Source: Zhang et al. 2024, "Wings: Learning Multimodal LLMs without Text-only Forgetting", equation 1 and figure 2
    (arXiv 2406.03496).
    """
    parts, device = anatomy(model), next(model.parameters()).device
    shown = [index for index, sample in enumerate(samples) if sample.images]
    whole = np.full((len(samples), len(measured_layers(model, parts)), len(SEGMENTS)), np.nan)
    left_out = {NO_IMAGE: len(samples) - len(shown), NO_TEXT_AFTER: 0, CONSTANT: 0}
    for start in range(0, len(shown), batch_size):
        chosen = shown[start : start + batch_size]
        batch = on_device(collator([samples[index] for index in chosen]), device)
        with around(batch):
            shares = attention_shares(model, batch)
        marks = segments(parts.image_mask(batch["input_ids"]), _valid(batch)).any(dim=1).cpu()
        for index, row, found in zip(chosen, shares.cpu(), marks, strict=True):
            reason = NO_IMAGE if not found[SEGMENTS.index("itself")] else NO_TEXT_AFTER if not found[SEGMENTS.index("after")] else None
            if reason:
                left_out[reason] += 1
            else:
                whole[index] = row.numpy()
        if progress is not None:
            progress(start + len(chosen), len(shown))
    is_measured = np.isfinite(whole).all(axis=(1, 2))
    if not is_measured.any():
        raise UserError(
            f"{len(samples)} samples came, none with an image and text after it, so there is no attention to compare. "
            "Give data whose questions have images."
        )
    shifts = shifts_of(whole)
    left_out[CONSTANT] = int((is_measured & ~np.isfinite(shifts)).sum())
    mean = whole[is_measured].mean(axis=0)
    return AttentionShift(
        layers=tuple(measured_layers(model, parts)),
        curves={name: tuple(mean[:, place].tolist()) for place, name in enumerate(SEGMENTS)},
        ids=tuple(sample.id for sample in samples),
        shifts=tuple(shifts.tolist()),
        left_out=left_out,
    )


def shifts_of(shares: Float[np.ndarray, "samples layers segments"]) -> Float[np.ndarray, " samples"]:
    """``1 - rho`` of the before and after curves of each sample; NaN where one of the two is constant or not known."""
    before, after = (shares[..., SEGMENTS.index(name)] for name in ("before", "after"))
    before, after = (curve - curve.mean(axis=-1, keepdims=True) for curve in (before, after))
    spreads = [np.sqrt((curve**2).mean(axis=-1)) for curve in (before, after)]
    is_known = (spreads[0] > FLAT) & (spreads[1] > FLAT)  # a comparison with NaN is false
    product = np.where(is_known, spreads[0] * spreads[1], np.nan)
    return 1 - np.clip((before * after).mean(axis=-1) / product, -1, 1)


@torch.no_grad()
def attention_shares(model: nn.Module, batch: Batch) -> Float[Tensor, "batch layers segments"]:
    """The share of attention that falls on each of `SEGMENTS`, for each row and decoder layer; the shares sum to 1.

    Sums over heads and over all tokens of a row as queries, divided by their total (heads times tokens, so the mean over
    both). Padding is in no segment and does not ask. Queries before a key are counted, too; where attention is causal
    their weights are 0. Of a row without image tokens all is "before".

    *Reconstructed*, because the paper gives sums and its figure shows values in 0..1: averaging over heads, and dividing by
    the number of queries. Ours: "between", which holds text between several images and the marks that some models put
    among the tokens of one image; layers of linear attention are left out.

    Args:
        batch: what the model's forward takes, with ``input_ids`` and, if rows are padded, ``attention_mask``.

    Raises:
        UserError: images do not enter this model as tokens, or its attention cannot carry columns.

    Source: Zhang et al. 2024, equation 1 (arXiv 2406.03496).
    """
    parts, valid = anatomy(model), _valid(batch)
    columns = segments(parts.image_mask(batch["input_ids"]), valid).float()
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"} | {"use_cache": False}
    inputs |= keeping(model, 1)  # nobody reads the logits
    found: dict[int, Tensor] = {}
    was_training = model.training
    hosts = {index: _host(model, parts, index) for index in measured_layers(model, parts)}
    with contextlib.ExitStack() as stack:
        stack.callback(model.train, was_training)
        stack.enter_context(carrying_columns(model, decoder=parts.decoder))
        for index, host in hosts.items():
            stack.enter_context(_watching(host, columns, partial(_keep, found, index, valid)))
        model.eval()  # dropout would be in the weights
        model(**inputs)
    sums = torch.stack([found[index] for index in hosts], dim=1)
    return sums / sums.sum(dim=-1, keepdim=True)


def segments(image: Bool[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens segments"]:
    """Which of `SEGMENTS` each token is in; padding is in none."""
    image = image & valid
    seen, to_come = image.cumsum(dim=1) > 0, image.flip(1).cumsum(dim=1).flip(1) > 0
    text, has_image = valid & ~image, image.any(dim=1, keepdim=True)
    return torch.stack([text & ~seen, image, text & seen & to_come, text & seen & ~to_come & has_image], dim=-1)


def measured_layers(model: nn.Module, parts: Anatomy) -> list[int]:
    """The decoder layers with a softmax over tokens.

    Raises:
        UserError: there are none, or images do not enter as tokens.
    """
    name, config = type(base_model(model)).__name__, getattr(base_model(model), "config", None)
    if getattr(config, "is_encoder_decoder", False) or any(path.endswith("cross_attn") for path in parts.attention):
        raise UserError(
            f"Images reach the decoder of {name} through cross-attention, not as tokens, so there is no text before and after "
            "them. Attention shift is for models that have image tokens."
        )
    if parts.image_token_id is None:
        raise UserError(f"{name} has no image token, so nothing is before or after an image. Give a vision-language model.")
    found = [index for index, path in enumerate(parts.attention) if path.rpartition(".")[2] in WEIGHTED]
    if not found:
        raise UserError(f"No decoder layer of {name} has a softmax over tokens, so there are no weights to sum. Give a transformer.")
    return found


def _host(model: nn.Module, parts: Anatomy, index: int) -> nn.Module:
    """A layer's own attention, under whatever is wrapped around it.

    Raises:
        UserError: it takes no keywords, or carries a prefix.
    """
    module = model.get_submodule(parts.attention[index])
    while isinstance(inner := getattr(module, "host", None), nn.Module):
        module = inner
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        raise UserError(f"{type(module).__name__} takes no keywords, so its weights cannot be summed. Give a model of Transformers itself.")
    if any(isinstance(child, LearntPrefix) for child in module.children()):
        what = "This model has prefixes, which take attention but are no tokens. Attention shift is not defined for it."
        raise UserError(f"{what} Leave it out of the evaluation, or measure another method.")
    return module


@contextlib.contextmanager
def _watching(host: nn.Module, columns: Float[Tensor, "batch tokens segments"], tell: Callable[[Tensor], None]) -> Iterator[None]:
    """Lays `columns` behind those that a learner's router gives, tells what they sum to, and hands on the router's sums."""
    count = columns.shape[-1]

    def add(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        theirs = kwargs.get(KEYWORD)
        joined = columns if theirs is None else torch.cat([theirs, columns.to(theirs.dtype)], dim=-1)
        assert joined.shape[-1] <= WIDTH, "the routers leave room for the segments"
        return args, {**kwargs, KEYWORD: joined}

    def split(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        sums, width = output[1], kwargs[KEYWORD].shape[-1]
        if not isinstance(sums, Tensor) or sums.shape[-1] != width:
            what = f"{type(module).__name__} hands no keywords to its attention, so its weights cannot be summed."
            raise UserError(f"{what} Give a model of Transformers itself.")
        tell(sums[..., width - count :])
        return (output[0], sums[..., : width - count] if width > count else None, *output[2:])

    hooks = [host.register_forward_pre_hook(add, with_kwargs=True), host.register_forward_hook(split, with_kwargs=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _keep(found: dict[int, Tensor], layer: int, valid: Bool[Tensor, "batch tokens"], sums: Float[Tensor, "batch tokens segments"]) -> None:
    """Adds up over the queries that are tokens; a padded one may hold NaN."""
    found[layer] = sums.float().masked_fill(~valid.unsqueeze(-1), 0.0).sum(dim=1)


def _valid(batch: Batch) -> Bool[Tensor, "batch tokens"]:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
