"""The parameters of a model whose parts may be wrapped: the base's own, where they were, and what values are for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alula.errors import UserError
from alula.models.anatomy import base_model, walk


def freeze_base(model: nn.Module) -> None:
    """The base model trains no more; what its wrappers brought (experts, learners, adapters of PEFT) is left as it is."""
    for _, module in walk(base_model(model)):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def original_paths(model: nn.Module) -> dict[str, str]:
    """For the path of each module of the base model the one that it had before anything was wrapped."""
    return {now: then for (now, _), (then, _) in zip(walk(model), walk(model, original=True), strict=True)}


def tensors_for(model: nn.Module, values: Mapping[str, Tensor], *, origin: str, remedy: str) -> dict[str, Tensor]:
    """The model's parameters and buffers that `values` are for, by name.

    Args:
        origin: where the values come from, for the error.
        remedy: what to do about values that do not fit, for the error.

    Raises:
        UserError: the model has no such tensor, or one of another shape.
    """
    known: dict[str, Any] = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in values.items():
        found = tuple(known[name].shape) if name in known else "none"
        if found != tuple(value.shape):
            raise UserError(f"{origin} holds '{name}' of shape {tuple(value.shape)}, the model has {found}. {remedy}")
    return {name: known[name] for name in values}


@torch.no_grad()
def put(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies into each of `own` the value of its name."""
    for name, tensor in own.items():
        tensor.copy_(values[name])
