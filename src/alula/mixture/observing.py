"""Gathers what closed-form routers know of a task: sums over the base model's activations, no sample."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alula.context import BASE
from alula.mixture.handle import Mixtures
from alula.routers import AnalyticRouter, GateRouter
from alula.routers.base import standardise


@torch.no_grad()
def observe(mixtures: Mixtures, name: str, inputs: Mapping[str, Any], *, tokens: bool = False) -> None:
    """Adds one batch of a task to the statistics its routers decide by, in one pass of the base model.

    Args:
        name: the expert the batch belongs to, or ``base`` for general text that belongs to none.
        inputs: a collated batch; what follows a row's first target is not looked at by the sample-level router.
        tokens: also gather token-level sums, ``dim ** 2`` numbers per block: needed for levels token and combined.
    """
    seen: set[str] = set()

    def at_site(path: str, block: str, x: Tensor, valid: Tensor) -> None:
        routers, rows = mixtures.sites[path].named_routers(), x[valid]
        gate, analytic = routers.get("gate"), routers.get("analytic")
        if name == BASE and isinstance(gate, GateRouter):
            gate.null_sum = gate.null_sum.to(x.device) + standardise(rows).double().sum(dim=0)
        if isinstance(analytic, AnalyticRouter) and block not in seen:
            seen.add(block)
            analytic.observe(name, rows)

    with mixtures.director.recording(observer=at_site if tokens else None):
        features = mixtures.director.describe(inputs)
    mixtures.prompt_router.observe(name, features)
