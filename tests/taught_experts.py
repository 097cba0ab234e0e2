"""LoRA experts that say something, on a tiny model."""

import torch
from torch import nn

from alula.mixture import Mixtures, attach
from zoo import build


@torch.no_grad()
def speaking(model: nn.Module, *names: str, scale: float = 0.3) -> Mixtures:
    """`model` with experts of these names, whose gates and updates are random instead of silent."""
    mixtures = attach(model)
    generator = torch.Generator().manual_seed(1)
    for name in names:
        mixtures.grow(name, rank=2, generator=generator)
    for mixture in mixtures.sites.values():
        for up in mixture.experts.B:
            up.normal_(std=scale, generator=generator)
        for gate in mixture.routers["gate"].gates:
            gate.normal_(generator=generator)
    mixtures.refresh()
    return mixtures


def taught(name, *, experts=("one", "two")):
    """A tiny model of its own, its processor, and the experts on it."""
    model, processor = build(name)
    return model, processor, speaking(model, *experts)


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def silence_dropout(model: nn.Module) -> None:
    """Training mode without chance."""
    model.train()
    for module in model.modules():
        for name in ("p", "drop_prob", "dropout", "activation_dropout", "attention_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
