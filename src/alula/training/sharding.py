"""A model whose own weights are spread over the processes (FSDP2); what methods add to it is whole on each of them.

Spread are the decoder layers, one unit each, with the embeddings and the head: a forward of any batch gathers all of them in
the same order. Encoder and connector stay whole: a process whose batch has no image leaves them out, and the others would
wait for it for ever. So do experts and routers, which are small and come and go; their gradients are summed by the loop.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed import get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from alula.errors import UserError
from alula.models.anatomy import anatomy, base_model, walk

SPREAD = ("decoder", "head")


def shard(model: nn.Module, *, device: torch.device) -> None:
    """Spreads the weights of the base model's decoder over all processes; in place, under the same names.

    From now on all processes must call the model the same number of times, with whatever batches.

    Raises:
        UserError: quantised weights.
    """
    parts = anatomy(model)
    own = {id(parameter) for _, module in walk(base_model(model)) for parameter in module.parameters(recurse=False)}
    whole: set[nn.Parameter] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) not in own or parts.part_of(name) not in SPREAD:
            whole.add(parameter)
        elif not parameter.is_floating_point():
            raise UserError(f"{name} is quantised; only plain weights can be sharded. Take 'shard' out, or load the model unquantised.")
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for module in (*map(model.get_submodule, parts.layers), model):
        # The root as well goes back to its shard after each forward: else its parameters would be others than the optimizer's.
        unit = fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        unit.set_force_sum_reduction_for_comms(True)  # the loop weights each micro-batch by its share of all targets:
        unit.set_gradient_divide_factor(1.0)  # gradients are summed, not averaged


def is_sharded(model: nn.Module) -> bool:
    """Whether the processes must call `model` in step."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with every shard replaced by the whole; all processes call it with the same names in the same order."""
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def spread_like(target: Tensor, value: Tensor) -> Tensor:
    """A whole `value` the way `target` is: this process's shard of it, if `target` is one of the same shape."""
    if isinstance(target, DTensor) and target.shape == value.shape:
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> float:
    """Scales all gradients down so that their norm is at most `limit`; gives the norm that they had."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    rest = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    norms = [nn.utils.get_total_norm(rest)] if rest else []
    if shards:
        total = nn.utils.get_total_norm(shards)
        norms.append(total.full_tensor() if isinstance(total, DTensor) else total)
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm() if norms else torch.zeros(())
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(scale.to(local.device))
    return norm.item()
