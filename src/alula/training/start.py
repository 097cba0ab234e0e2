"""On which devices a model trains, and whether its weights are spread over them."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from alula.errors import UserError
from alula.methods.base import METHODS, Method
from alula.training.settings import TrainSettings
from alula.training.sharding import is_sharded, shard
from alula.training.trackers import check_trackers

logger = logging.getLogger(__name__)


def make_accelerator(given: Accelerator | None, *, trackers: Sequence[str], folder: Path | None) -> Accelerator:
    """`given`, or one for the devices that are there which writes to `trackers` below `folder`.

    Raises:
        UserError: an unknown or missing tracker, trackers without a folder or beside an accelerator of one's own, DeepSpeed, fp16,
            or FSDP's first version.
    """
    if given is None or trackers:
        check_trackers(given, trackers=trackers, folder=folder)
    if given is None:
        # Without an accelerator to be found, Accelerate takes several processes for one unless it is told `cpu`.
        given = Accelerator(cpu=not torch.accelerator.is_available(), log_with=list(trackers) or None, project_dir=folder)
    if given.distributed_type is DistributedType.DEEPSPEED:
        raise UserError(
            "The accelerator is set to DeepSpeed, whose engine keeps gradients and optimizer to itself; methods and the weighting by "
            "targets need both. Make it without DeepSpeed and give the config to the training settings, "
            "alula.config.check_train({'deepspeed': 'ds_config.json'}), which spreads the weights with FSDP2; or attach experts and train "
            "them with transformers.Trainer, which takes DeepSpeed itself (docs/distributed.md)."
        )
    if given.scaler is not None:
        raise UserError(
            "The accelerator is set to fp16, which scales losses; the loop reads gradients as they are. Take --mixed_precision fp16 out "
            "and set mixed_precision to bf16 in the training settings."
        )
    if given.distributed_type is DistributedType.FSDP and not given.is_fsdp2:
        raise UserError("The accelerator is set to FSDP's first version. Version 2 is accepted: add --fsdp_version 2.")
    return given


def spread_model(model: nn.Module, method: Method, *, accelerator: Accelerator, settings: TrainSettings) -> nn.Module:
    """`model` on its device; spread over the processes, in place, if that is wanted.

    Raises:
        UserError: a method or model for which that would go wrong.
    """
    is_wanted = settings.shard or accelerator.distributed_type is DistributedType.FSDP
    if is_wanted and accelerator.num_processes == 1:
        logger.warning("shard is set, but there is one process: nothing to spread. Start with torchrun or accelerate launch.")
    elif is_wanted and not is_sharded(model):
        if not method.can_shard:
            known = ", ".join(name for name in METHODS if METHODS[name].can_shard)
            raise UserError(
                f"{method.name} reads or changes the model's weights as a whole, which are spread over the processes with shard: true. "
                f"Methods that can do without: {known}; additions there: those that copy no weights that are spread. "
                "Set shard to false, or choose one of them."
            )
        shard(model, device=accelerator.device)
    return model.to(accelerator.device)
