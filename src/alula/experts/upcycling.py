"""Feed-forward networks of a decoder turned into sparse ones, in any Transformers model; saved and loaded with it.

Source: Sparse Upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055) for copies. MM1 (arXiv 2403.09611, sec. 3.5.1) has 64 experts in
every 2nd layer of 3B and 32 in every 4th of 7B, and does not say how they begin: both ways are here.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from alula.errors import UserError, nearest
from alula.experts.sparse_ffn import SparseFFN, is_sparse, logged_scores
from alula.models.anatomy import Anatomy, anatomy
from alula.models.loading import CHANGED_CLASSES
from alula.models.loose_ffn import gathered, is_loose

CONFIG = "alula_sparse_ffn"
"""The attribute of a model's configuration that says how it was upcycled."""
WAYS = ("copy", "fresh")


def upcycle(
    model: PreTrainedModel,
    *,
    experts: int = 8,
    every: int = 2,
    top_k: int = 2,
    init: str = "copy",
    capacity: float | None = None,
) -> list[str]:
    """Turns the feed-forward network of every so many decoder layers into a sparse one, in place; gives their paths.

    The model's configuration remembers it: `save_pretrained` writes what `load_model` and `load_upcycled` read.

    Args:
        experts: networks in each such layer (1 or more).
        every: layers from one sparse network to the next; of 2, layers 1, 3, 5 ... counted from 0.
        top_k: experts of each token. With 1 the weights are all 1, and only balance losses teach the gate.
        init: ``copy``: the experts begin as the dense network, so that the model's output is what it was, to the bit as far as a matrix
            product's rows do not depend on their number (in float32 large products round otherwise); ``fresh``: as a new network
            would, with normal weights of the configuration's ``initializer_range``.
        capacity: of each expert in training, as a multiple of an even share (2 in MM1); None: no token is dropped.

    Raises:
        UserError: numbers out of range, a model without feed-forward networks of its own, or one that is sparse already.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> upcycle(LlamaForCausalLM(config), experts=4)
        ['model.layers.1.mlp', 'model.layers.3.mlp']
    """
    check_upcycling(experts=experts, every=every, top_k=top_k, init=init, capacity=capacity)
    parts = anatomy(model)
    found = _networks(model, parts, parts.layers[every - 1 :: every])
    _check(model, found)
    spread = getattr(model.config.get_text_config(decoder=True), "initializer_range", 0.02)
    for path, dense in found.items():
        above = model.get_submodule(path.rpartition(".")[0])
        dense = gathered(above) if is_loose(above) else dense
        copies = [dense, *(copy.deepcopy(dense) for _ in range(experts - 1))]
        if init == "fresh":
            for each in copies:
                _renew(each, spread)
        sparse = SparseFFN(copies, dim=parts.hidden_size, top_k=top_k, capacity=capacity)
        model.set_submodule(path, sparse.train(dense.training))
    setattr(model.config, CONFIG, {"experts": experts, "every": every, "top_k": top_k, "capacity": capacity})
    return list(found)


def check_upcycling(*, experts: int = 8, every: int = 2, top_k: int = 2, init: str = "copy", capacity: float | None = None) -> None:
    """Refuses what `upcycle` refuses of any model.

    Raises:
        UserError: numbers out of range or of another type, or an unknown way to begin.
    """
    whole = all(isinstance(number, int) and not isinstance(number, bool) and number >= 1 for number in (experts, every, top_k))
    has_room = capacity is None or (isinstance(capacity, int | float) and 0 < capacity < math.inf)
    if not (whole and top_k <= experts and has_room):
        raise UserError(
            f"experts {experts!r}, every {every!r}, top_k {top_k!r}, capacity {capacity!r} came. Whole numbers from 1 up, top_k at most "
            "the number of experts and a capacity above 0 or None are accepted. Correct them."
        )
    if init not in WAYS:
        raise UserError(f"Unknown way to begin '{init}'. {nearest(init, WAYS)}")


def _networks(model: nn.Module, parts: Anatomy, layers: Sequence[str]) -> dict[str, nn.Module]:
    """The feed-forward networks of these layers by path; by that of its first linear where the layer holds them itself."""
    own = [path for path in parts.mlp if any(path.startswith(f"{layer}.") for layer in layers)]
    loose = [f"{layer}.fc1" for layer in layers if is_loose(model.get_submodule(layer))]
    return {path: model.get_submodule(path) for path in own or loose}


def _check(model: PreTrainedModel, found: Mapping[str, nn.Module]) -> None:
    if not found:
        raise UserError(
            f"{type(model).__name__} has no feed-forward network of its own in the layers asked for. Models whose decoder layers have an "
            "'mlp' (Llama, Qwen, Gemma, SmolVLM ...) or 'fc1' and 'fc2' (OPT, BART ...) and an `every` up to their number of layers are "
            "accepted."
        )
    if is_sparse(model):
        raise UserError(
            f"This {type(model).__name__} was upcycled already; a second time would forget the first. Start from a dense model."
        )
    for path, module in found.items():
        if any(name.rpartition(".")[2] in ("experts", "gate", "router") for name, _ in module.named_modules()):
            raise UserError(f"{path} is a mixture of experts already ({type(module).__name__}). Start from a dense model.")


@torch.no_grad()
def _renew(network: nn.Module, spread: float) -> None:
    """New values for matrices and biases; norms stay."""
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=spread)
        elif name.endswith("bias"):
            parameter.zero_()


def load_upcycled(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The model that `upcycle` changed and `save_pretrained` wrote, in eval mode; one of text alone too.

    Args:
        folder: or the name of a hub repository.
        options: of `from_pretrained` (``dtype``, ``attn_implementation``, ``device_map`` ...).

    Raises:
        UserError: no such model, or one that was not upcycled.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"'{folder}' is no model folder: {str(error).splitlines()[0]} Give one that save_pretrained wrote.") from error
    if getattr(config, CONFIG, None) is None:
        raise UserError(f"The model in '{folder}' was not upcycled. Load it with load_model, or call upcycle on it and save it.")
    try:
        kind = class_that_sees(config)
    except ValueError:
        kind = _upcycled(AutoModelForCausalLM, config)
    return kind.from_pretrained(folder, **options).eval()


@CHANGED_CLASSES.register(CONFIG)
def class_that_sees(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that loads an upcycled vision-language model.

    Raises:
        ValueError: the configuration is not of one.
    """
    return _upcycled(AutoModelForImageTextToText, config)


def _upcycled(kind: Any, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The upcycled form of the class that `kind` finds for the dense model, without its weights."""
    with torch.device("meta"):
        return upcycled_class(type(kind.from_config(config)), getattr(config, CONFIG))


def upcycled_class(dense: type[PreTrainedModel], asked: Mapping[str, Any]) -> type[PreTrainedModel]:
    """The class of a dense model's upcycled form, so that `from_pretrained` finds a place for every weight."""

    class Upcycled(dense):  # type: ignore[valid-type, misc]
        def __init__(self, config: Any, *values: Any, **keywords: Any) -> None:
            super().__init__(config, *values, **keywords)
            upcycle(self, **asked)

    # By these names Transformers knows how the weights are called in files, and save_pretrained the class.
    Upcycled.__name__, Upcycled.__qualname__, Upcycled.__module__ = dense.__name__, dense.__qualname__, dense.__module__
    return Upcycled


@torch.no_grad()
def routing_statistics(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How the sparse networks send the tokens of one batch, by path; as the model is, in training or evaluation mode.

    Returns:
        for each ``load``, the share (0-1) of the filled places that each expert has; ``dropped``, the share of the choices that found
        no place; ``confidence``, the mean weight of the first choice. Padding is left out.
    """
    with logged_scores(model) as log:
        model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False)
    found: dict[str, dict[str, Any]] = {}
    for path, scores in log.take().items():
        weights, index = log.networks[path].choose(scores)
        valid = valid_tokens(batch.get("attention_mask"), scores)
        wanted = torch.ones_like(weights, dtype=torch.bool) if valid is None else valid.unsqueeze(-1).expand_as(weights)
        filled = wanted & (weights > 0)
        counts = torch.bincount(index[filled], minlength=scores.shape[-1])
        found[path] = {
            "load": (counts / counts.sum().clamp(min=1)).tolist(),
            "dropped": 1.0 - float(filled.sum() / wanted.sum().clamp(min=1)),
            "confidence": float(weights[..., 0][wanted[..., 0]].mean()),
        }
    return found


def valid_tokens(attention_mask: Any, scores: torch.Tensor) -> torch.Tensor | None:
    """Which tokens of the scores are no padding; None where the batch does not say.

    Args:
        attention_mask: batch x tokens, true where a token is; or batch x 1 x tokens x tokens of packed rows (`alula.data.packing`), where
            padding sees itself alone and is seen by nobody else. A sample of one token, which has no target, is as padding there.
    """
    if not isinstance(attention_mask, torch.Tensor):
        return None
    if attention_mask.dim() == 4 and attention_mask.dtype == torch.bool:
        one = torch.eye(attention_mask.shape[-1], dtype=torch.bool, device=attention_mask.device)
        others = attention_mask[:, 0] & ~one
        attention_mask = others.any(dim=1) | others.any(dim=2)
    fits = attention_mask.dim() == 2 and attention_mask.numel() == scores.shape[:2].numel()  # OPT shows all rows as one
    return attention_mask.bool().reshape(scores.shape[:2]) if fits else None
