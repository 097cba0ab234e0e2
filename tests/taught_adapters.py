"""Adapters that say different things, on models that tests share."""

import pytest
import torch

from alula.adapters import attach_adapters
from taught_learners import built

SMALL = {"bottleneck": 4, "hidden_dim": 8}


@torch.no_grad()
def teach(adapters, *, seed=1):
    """Adapters that say different things, and routers that choose differently."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters.parameters().items():
        if name.endswith((".up.weight", ".down.weight")):
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        elif ".router." in name:
            parameter.normal_(std=1.0, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return adapters


@pytest.fixture
def attached():
    """Adapters on models that tests share; they leave at the end."""
    handles = []

    def make(family="llava", *, taught=True, **options):
        model, processor = built(family)
        handles.append(attach_adapters(model, **{**SMALL, **options}))
        return model, processor, teach(handles[-1]) if taught else handles[-1]

    yield make
    for handle in handles:
        handle.detach()


@torch.no_grad()
def logits(model, batch, **options):
    return model(**batch, **options).logits


def chosen(model, adapters, batch):
    """What each site's router chose."""
    found = {}
    with torch.no_grad(), adapters.recording(lambda path, choice, valid: found.update({path: choice.index})):
        model(**batch)
    return torch.stack(list(found.values()))
