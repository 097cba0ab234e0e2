"""`attach_adapters`: feed-forward networks of a model become mixtures. It knows no file and no training."""

from typing import Any

import torch
from torch import nn

from alula.adapters.config import OWN, AdapterConfig
from alula.adapters.handle import Adapters
from alula.adapters.instruction import Instructions, MeanEmbedding, SentenceEmbedding
from alula.adapters.site import AdapterMixture
from alula.errors import UserError, nearest
from alula.experts.adapter import Adapter
from alula.models.anatomy import Anatomy, anatomy
from alula.models.parameters import freeze_base
from alula.routers.instruction import READS, HardRouter


def attach_adapters(model: nn.Module, *, config: AdapterConfig | None = None, tokenizer: Any = None, **options: Any) -> Adapters:
    """Puts adapters beside the feed-forward networks of any decoder-style model, silent at birth and ready to train.

    The base is frozen; experts and learners that are there already, or come later, train on or not as their own handle says.

    Args:
        config: how they sit in it; or its fields as keywords (see `AdapterConfig`).
        tokenizer: the model's own; needed where a sentence encoder reads the instruction.

    Raises:
        UserError: an unknown router or layer, a sentence encoder without a tokenizer, adapters that are there already, or a model whose
            layers hold no feed-forward network as a module of its own.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=2, num_key_value_heads=2))
        >>> attach_adapters(model, num_experts=2, bottleneck=4, hidden_dim=8).summary()
        '2 feed-forward networks carry 2 adapters of width 4, chosen by instance, (824 parameters)'
    """
    config, parts = config or AdapterConfig(**options), anatomy(model)
    if any(isinstance(module, AdapterMixture) for module in model.modules()):
        raise UserError("This model carries adapters already. Use the handle that `attach_adapters` gave, or `detach` first.")
    if config.router not in READS:
        raise UserError(f"Unknown router '{config.router}'. {nearest(config.router, READS)}")
    if config.instruction != OWN and tokenizer is None:
        raise UserError(f"instruction: '{config.instruction}' came, which reads text. Give the model's tokenizer, or take '{OWN}'.")
    embed: Instructions = MeanEmbedding(model) if config.instruction == OWN else SentenceEmbedding(config.instruction, tokenizer)
    places = _places(model, parts, config.layers)
    freeze_base(model)
    sites = {path: _mixture(model.get_submodule(path), path, index, parts, config, embed) for path, index in places.items()}
    for path, mixture in sites.items():
        model.set_submodule(path, mixture.train(model.training))
    handle = Adapters(model, parts, sites, config, embed)
    handle.enter()
    return handle


def _places(model: nn.Module, parts: Anatomy, layers: tuple[int, ...] | None) -> dict[str, int]:
    """The feed-forward networks by path, with their decoder layers."""
    count = parts.num_layers
    for index in layers or ():
        if not -count <= index < count:
            raise UserError(f"There is no decoder layer {index}. The layers are 0 to {count - 1}. Correct `layers`.")
    found = {path: next(i for i, layer in enumerate(parts.layers) if path.startswith(f"{layer}.")) for path in parts.mlp}
    chosen = set(range(count)) if layers is None else {index % count for index in layers}
    missing = sorted(chosen - set(found.values()))
    if missing:
        raise UserError(
            f"Layer {missing[0]} of {type(model).__name__} holds no feed-forward network as a module of its own, so no adapter can stand "
            "beside it. Choose other `layers`, or use LoRA experts (`attach`)."
        )
    return {path: index for path, index in found.items() if index in chosen}


def _mixture(host: nn.Module, path: str, index: int, parts: Anatomy, config: AdapterConfig, embed: Instructions) -> AdapterMixture:
    weight = next(host.parameters())
    dtype = weight.dtype if weight.dtype in (torch.float32, torch.float64) else torch.float32
    adapters = [Adapter(parts.hidden_size, bottleneck=config.bottleneck).to(weight.device, dtype) for _ in range(config.num_experts)]
    router = None
    if config.num_experts > 1:
        router = HardRouter(
            parts.hidden_size,
            num_experts=config.num_experts,
            instruction_dim=embed.width,
            reads=config.router,
            hidden_dim=config.hidden_dim,
            gumbel=config.gumbel,
        ).to(weight.device)
    return AdapterMixture(host, adapters=adapters, router=router, path=path, index=index)
