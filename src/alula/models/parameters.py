"""The parameters of a model whose parts may be wrapped: the base's own, where they were, what values are for; and how wrappers go."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
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


def put_back(model: nn.Module, wrappers: Mapping[str, nn.Module], *, inside: Mapping[str, Collection[nn.Module]], what: str) -> None:
    """Puts the host of each wrapper back where the wrapper is.

    Args:
        inside: by path, the modules that were in the host when it was wrapped.
        what: the wrappers' name, for the error.

    Raises:
        UserError: something else was attached after them and is still there; nothing was changed then.
    """
    hosts = {path: wrapper.get_submodule("host") for path, wrapper in wrappers.items()}
    for path, host in hosts.items():
        if set(host.modules()) != set(inside[path]):
            raise UserError(f"{path} was changed after the {what} came. Detach what was attached last (LoRA experts) first.")
    for path, host in hosts.items():
        model.set_submodule(path, host)


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


def exchange(model: nn.Module, values: Mapping[str, Tensor], *, origin: str) -> Callable[[], None]:
    """Puts these values in place of the base model's own, and gives what puts those back.

    Args:
        origin: where the values come from, for the error.

    Raises:
        UserError: the model has no such tensor, or one of another shape.
    """
    own = tensors_for(model, values, origin=origin, remedy="Load the base model they were made for.")
    former = {name: tensor.detach().clone() for name, tensor in own.items()}
    put(own, values)
    return partial(put, own, former)


@torch.no_grad()
def put(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies into each of `own` the value of its name."""
    for name, tensor in own.items():
        tensor.copy_(values[name])
