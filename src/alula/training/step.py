"""The gradients of one optimizer step, from its micro-batches on all processes. It knows no method and no optimizer."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from alula.objectives.next_token import num_targets
from alula.training.order import Batch
from alula.training.trainable import sum_over_processes


def accumulate(
    batch: Sequence[Batch], loss: Callable[[Batch], dict[str, Tensor]], *, total: int, accelerator: Accelerator, in_step: bool
) -> dict[str, float]:
    """Goes backward through every micro-batch of this process; gives the parts of the loss, summed over all processes.

    Each micro-batch's loss, a mean over its targets, counts with its share of the targets of the whole step. A mean of means
    would weight the tokens of short answers more (gradients up to 83 % off).

    Args:
        loss: the named parts for one micro-batch.
        total: targets of the step on all processes (1 or more).
        in_step: all processes go through the model equally often, as a sharded one needs it.
    """
    counted = [(part, count) for part in batch if (count := num_targets(part["labels"]))]  # without targets a mean is 0 / 0
    if in_step:
        counted += [(_with_targets(batch[0]), 0)] * (_most(len(counted), accelerator) - len(counted))
    parts: dict[str, Tensor] = {}
    for micro_batch, count in counted:
        weighted = {name: value * (count / total) for name, value in loss(micro_batch).items()}
        summed = torch.stack(list(weighted.values())).sum()
        if summed.requires_grad:  # a text-only micro-batch knows nothing of a connector: its gradient is zero
            accelerator.backward(summed)
        for name, value in weighted.items():
            parts[name] = parts.get(name, 0) + value.detach()
    return _sum_parts({name: float(value) for name, value in parts.items()}, accelerator)


def count_targets(batch: Sequence[Batch], accelerator: Accelerator) -> int:
    """The targets of a step on all processes."""
    own = sum(num_targets(part["labels"]) for part in batch)
    return int(sum_over_processes(torch.tensor(own, device=accelerator.device), accelerator))


def _most(number: int, accelerator: Accelerator) -> int:
    """The largest `number` of all processes."""
    found = torch.tensor(number, device=accelerator.device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return int(found)


def _with_targets(batch: Batch) -> Batch:
    """A micro-batch to go through the model with at weight zero: any targets do, but a mean over none is no number."""
    return {**batch, "labels": batch["input_ids"]}


def _sum_parts(parts: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    """The parts of the loss over all processes; one without samples may have none."""
    if accelerator.num_processes == 1:
        return parts
    every = gather_object([parts])
    return {name: sum(part.get(name, 0.0) for part in every) for name in sorted({key for part in every for key in part})}
