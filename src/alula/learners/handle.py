"""`attach_learners` and what it gives back: the handle on a model's learners."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from alula.context import Variable
from alula.errors import UserError, nearest
from alula.experts.lorra import LoRRA
from alula.learners.attention import MODALITIES, AttentionMixture, joining_norm
from alula.learners.columns import carry_columns
from alula.learners.features import KEYWORD, Features, documents_of, num_seen, valid_tokens
from alula.models.anatomy import Anatomy, anatomy
from alula.models.handle import Handle
from alula.models.parameters import freeze_base
from alula.routers.learner import LEARNER_ROUTERS


class LearnerConfig(BaseModel):
    """How learners sit in a model; kept with their tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    modalities: tuple[str, ...] = MODALITIES
    """Which learners: image, text, or both."""
    rank: int = Field(64, ge=1)
    """Width of each low-rank map; 64 in the paper's scripts."""
    router: str = "position"
    """position (the paper's), mass, hidden or none."""
    positions: int = Field(4096, ge=1)
    """Columns of the position router's matrix."""
    neither: bool = False
    """Lets the router give weight to no learner at all."""
    strict_text: bool = False
    """Rows without an image are bit-identical to the host's."""
    layers: tuple[int, ...] | None = None
    """Decoder layers by index; None is all with softmax attention over keys of their own."""
    reference: bool = False
    """The arithmetic of the official code (see `AttentionMixture`)."""
    causal_images: bool = False
    """A token sees only images that ended before it: for conversations in which later turns bring images."""
    text_start: int = Field(0, ge=0)
    """So many first text tokens of a row are no features: the system prompt; 14 in the official code for Qwen, 17 for Llama."""


class Learners(Handle[AttentionMixture]):
    """The learners of one model, and which of them speak. Made by `attach_learners`.

    Attributes:
        model: the model, whose attention modules at `sites` are mixtures now.
        config: how they sit in it.
    """

    own, what = ("learners.", "router."), "learners"

    def __init__(self, model: nn.Module, parts: Anatomy, sites: Mapping[str, AttentionMixture], config: LearnerConfig) -> None:
        super().__init__(model, parts, sites)
        self.config = config
        self._speaking = Variable("alula_learners", (config.modalities, config.router != "none"))

    @contextlib.contextmanager
    def using(self, *modalities: str, routed: bool = True) -> Iterator[None]:
        """Lets only these learners speak inside the block; none: the base model.

        Args:
            routed: False adds each with weight 1, as in the paper's first stage.

        Raises:
            UserError: a learner that is not there.
        """
        for name in modalities:
            if name not in self.config.modalities:
                raise UserError(f"There is no learner for '{name}'. {nearest(name, self.config.modalities)}")
        token = self._speaking.set((modalities, routed and self.config.router != "none"))
        try:
            yield
        finally:
            self._speaking.reset(token)

    def train(self, *modalities: str, router: bool = True) -> None:
        """Lets the learners of these modalities (and the router) train; changes nothing else."""
        for path, parameter in self.parameters().items():
            parameter.requires_grad_(router if ".router." in path else path.split(".learners.")[1].split(".")[0] in modalities)

    def enter(self) -> None:
        """Places the hooks: one before the model, one per layer that hands on its input, one per late norm."""
        self._undo.append(self.model.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        indices = {0, *(mixture.index for mixture in self.sites.values())}
        for index in sorted(indices):
            layer = self.model.get_submodule(self.anatomy.layers[index])
            self._undo.append(layer.register_forward_pre_hook(_hand_on(index), with_kwargs=True).remove)
        for mixture in self.sites.values():
            if mixture.joins_late:
                layer = self.model.get_submodule(self.anatomy.layers[mixture.index])
                self._undo.append(layer.get_submodule(joining_norm(layer) or "").register_forward_hook(mixture.join).remove)
        nothing = torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long)
        if any(mixture.router.columns(*nothing) is not None for mixture in self.sites.values()):
            self._undo.append(carry_columns(self.model, decoder=self.anatomy.decoder))

    def _before(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        modalities, is_routed = self._speaking.get()
        if not modalities:
            return args, {**kwargs, KEYWORD: None}
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise UserError("Learners must know which tokens are image tokens; the call has no `input_ids`. Pass token ids.")
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        valid = valid_tokens(mask, ids, seen=num_seen(cache, num_layers=self.anatomy.num_layers))
        # The host, too, takes rows for packed only without a mask of two axes and without a cache.
        may_be_packed = cache is None and not (isinstance(mask, Tensor) and mask.dim() == 2)
        image = self.anatomy.image_mask(ids) & valid
        features = Features(
            marks=torch.stack([valid & ~image, image], dim=-1).float(),
            documents=documents_of(kwargs.get("position_ids"), valid) if may_be_packed else None,
            modalities=modalities,
            is_routed=is_routed,
            num_layers=self.anatomy.num_layers,
            shows_weights=bool(kwargs.get("output_attentions", model.config.get_text_config(decoder=True).output_attentions)),
        )
        return args, {**kwargs, KEYWORD: features}

    def summary(self) -> str:
        """One line: which learners sit where, and how many parameters they have."""
        count = sum(parameter.numel() for parameter in self.parameters().values())
        kinds = " and ".join(self.config.modalities)
        return f"{len(self.sites)} attention layers carry {kinds} learners of rank {self.config.rank} ({count:,} parameters)"


def _hand_on(index: int) -> Any:
    def hand_on(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        features = kwargs.get(KEYWORD)
        if isinstance(features, Features):
            hidden = args[0] if args else kwargs["hidden_states"]
            features.memo.residual[index] = hidden
            if index == 0:
                features.memo.layer0 = hidden

    return hand_on


def attach_learners(model: nn.Module, *, config: LearnerConfig | None = None, **options: Any) -> Learners:
    """Puts learners beside the attention of any decoder-style vision-language model, silent at birth and ready to train.

    The base is frozen; LoRA experts that are there already, or come later, train on or not as their own handle says.

    Args:
        config: how they sit in it; or its fields as keywords (see `LearnerConfig`).

    Raises:
        UserError: an unknown modality, router or layer, learners that are there already, or a model whose images do not
            enter the token sequence (cross-attention models).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=2, num_key_value_heads=2))
        >>> attach_learners(model, rank=4, router="mass").summary()
        '2 attention layers carry image and text learners of rank 4 (2,060 parameters)'
    """
    config = config or LearnerConfig(**options)
    parts = anatomy(model)
    _check(model, config, parts)
    chosen = [index % parts.num_layers for index in (parts.softmax_layers if config.layers is None else config.layers)]
    freeze_base(model)
    sites: dict[str, AttentionMixture] = {}
    for index in chosen:
        path = parts.attention[index]
        host = model.get_submodule(path)
        weight = next(host.parameters())
        dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
        layer = model.get_submodule(parts.layers[index])
        extra = {"positions": config.positions} if config.router == "position" else {}
        router = LEARNER_ROUTERS[config.router](parts.hidden_size, classes=len(config.modalities) + config.neither, **extra)
        sites[path] = AttentionMixture(
            host,
            index=index,
            learners={
                name: LoRRA(parts.hidden_size, head_dim=_head_dim(model, host), rank=config.rank).to(device=weight.device, dtype=dtype)
                for name in config.modalities
            },
            router=router.to(device=weight.device),
            joins_late=joining_norm(layer) is not None,
            factor=getattr(layer, "residual_multiplier", 1.0),
            strict_text=config.strict_text,
            reference=config.reference,
            causal_images=config.causal_images,
            text_start=config.text_start,
        ).train(model.training)
    for path, mixture in sites.items():
        model.set_submodule(path, mixture)
    handle = Learners(model, parts, sites, config)
    try:
        handle.enter()
    except UserError:
        handle.detach()
        raise
    return handle


def _head_dim(model: Any, host: nn.Module) -> int:
    """The host's head size, which its rotary embedding is made for."""
    config = model.config.get_text_config(decoder=True)
    found = getattr(host, "head_dim", None)
    return int(found) if isinstance(found, int) else config.hidden_size // config.num_attention_heads


def _check(model: Any, config: LearnerConfig, parts: Anatomy) -> None:
    if any(isinstance(module, AttentionMixture) for module in model.modules()):
        raise UserError("This model carries learners already. Use the handle that `attach_learners` gave, or `detach` first.")
    for name in config.modalities:
        if name not in MODALITIES:
            raise UserError(f"Unknown modality '{name}'. {nearest(name, MODALITIES)}")
    for index in config.layers or ():
        if not -(count := parts.num_layers) <= index < count or index % count not in parts.softmax_layers:
            able = f"Of 0 to {count - 1} have it: {', '.join(map(str, parts.softmax_layers)) or 'none'}"
            raise UserError(f"There is no decoder layer {index} with softmax attention. {able}. Correct `layers`.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{type(model).__name__} is an encoder-decoder; learners sit in decoder-only models. Use `attach` (LoRA experts).")
    crossing = [path for path in parts.attention if path.endswith("cross_attn")]
    if crossing:
        raise UserError(
            f"Images reach this model through cross-attention ({crossing[0]}), not as tokens, so learners find no image features. "
            "Use `attach` (LoRA experts) for this model."
        )
