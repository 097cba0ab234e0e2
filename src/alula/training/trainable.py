"""What in a model trains and what is frozen: listing, modes, gradients over processes. It knows no method."""

import re
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alula.errors import UserError
from alula.models.parameters import tensors_for
from alula.training.sharding import spread_like


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def describe(parameters: dict[str, nn.Parameter]) -> str:
    """One line per group of like-named parameters (layer numbers shown as ``*``) with its count."""
    groups: dict[str, list[int]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(parameter.numel())
    return "\n".join(f"  {name}: {sum(sizes):,} in {len(sizes)} tensors" for name, sizes in groups.items())


def set_modes(model: nn.Module) -> None:
    """Training mode where something trains, evaluation mode where everything is frozen.

    A frozen encoder in training mode would move its running statistics and add dropout noise: it would not be frozen.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
    for module in model.modules():
        # Transformers recomputes a layer only if that very module is in training mode, frozen or not.
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def recompute_activations(model: Any) -> None:
    """Turns activation checkpointing on.

    Raises:
        UserError: the model cannot do it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(model).__name__} has no activation checkpointing. Models with supports_gradient_checkpointing do. "
            "Set training.activation_checkpointing to false and lower micro_batch_size instead."
        )
    # The first is the name from some 5.x of transformers on, which warns at the second.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # Re-entrant checkpointing loses gradients when only modules deep inside a frozen model train.
    enable({"use_reentrant": False})


def sum_over_processes(value: Tensor, accelerator: Accelerator) -> Tensor:
    """`value` summed over all processes, in place; itself if there is one."""
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(value)
    return value


def sum_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Adds up the gradients of all processes, in place; those of shards were added up when they were made.

    A plain sum and not DistributedDataParallel, which averages, wants every parameter used on every process (a process
    without images leaves the connector out) and hides the model's attributes from methods. What trains here is small.
    """
    if accelerator.num_processes == 1:
        return
    parameters = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    used = torch.tensor([parameter.grad is not None for parameter in parameters], device=accelerator.device).int()
    for parameter, count in zip(parameters, sum_over_processes(used, accelerator).tolist(), strict=True):
        if count:  # a parameter nobody used keeps no gradient, so that the optimizer leaves it alone
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            sum_over_processes(parameter.grad, accelerator)


@torch.no_grad()
def load_values(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copies `values` into the model's parameters and buffers of those names.

    Raises:
        UserError: the model has no such tensor, or one of another shape.
    """
    own = tensors_for(
        model,
        values,
        origin="The checkpoint",
        remedy="Use the model and options it was made with, or delete the checkpoint folder to start anew.",
    )
    for name, value in values.items():
        own[name].copy_(spread_like(own[name], value))
