"""A DeepSpeed config as settings of alula's own loop, which runs them in place of DeepSpeed's engine."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alula.data.checking import check
from alula.errors import UserError
from alula.training.deepspeed_config import SCHEDULES, DeepSpeedConfig, read_config
from alula.training.settings import TrainSettings

logger = logging.getLogger(__name__)

KEY, LAUNCHED = "deepspeed", "launched_deepspeed"
"""The user's config among the settings, and the one that ``accelerate launch`` brings."""


class Taken(NamedTuple):
    """A setting that follows from a config.

    Attributes:
        source: the config's key.
        said: the config's value.
    """

    key: str
    value: Any
    source: str
    said: Any


def with_deepspeed(
    train: Mapping[str, Any],
    *,
    kind: type[TrainSettings] = TrainSettings,
    where: str,
    path: tuple[str, ...] = (),
    dtype: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    num_processes: int | None = None,
) -> dict[str, Any]:
    """Training settings, not yet checked, with what the DeepSpeed config among them stands for in place of it; without one as they are.

    What the config leaves out, or calls ``auto``, is as in the other settings; what both say must agree. The log says what was taken
    and what has no effect.

    Args:
        kind: what the settings will be.
        where: what messages call the place of the settings.
        path: where in it they are.
        dtype: of the model's weights; None: unknown here.
        defaults: settings for what neither says.
        num_processes: that train together; None: those of this process's group.

    Raises:
        UserError: a config that cannot be read or asks for what the loop does not do, one that contradicts the other settings, or two
            that differ.
    """
    given = {key: value for key, value in train.items() if key not in (KEY, LAUNCHED)}
    whole = {**(defaults or {}), **given}
    places = {KEY: f"{where}: '{'.'.join((*path, KEY))}'", LAUNCHED: "accelerate launch --use_deepspeed"}
    sources = {place: train[key] for key, place in places.items() if key in train}
    if not sources:
        return whole
    ours = check(kind, whole, where, path=path)
    name, config, idle = _read_one(sources)
    if config.bf16.enabled and dtype == "float16":
        raise UserError(f"{name}: 'bf16' is on, but the recipe's dtype is float16. Take one of them out, or set dtype to bfloat16.")
    index, count = _place() if num_processes is None else (0, num_processes)
    wanted = (*_batches(config, ours, count, name, is_given="batch_size" in given), *_spreading(config), *_numbers(config, ours, name))
    taken = _agreed(wanted, {key: getattr(ours, key) for key in given}, name)
    if index == 0:
        shown = ", ".join(f"{key} {value}" for key, value in taken.items()) or "nothing, since all that counts is auto"
        kept = f" The weights keep their dtype{f' ({dtype})' if dtype else ''}." if config.bf16.enabled else ""
        # As warnings, which also a program without logging shows: another engine than the config's name promises will run.
        logger.warning("%s: a DeepSpeed config, run by alula's own loop and FSDP2. Taken from it: %s.%s", name, shown, kept)
        if idle:
            logger.warning("%s: without effect here: %s.", name, ", ".join(idle))
    return whole | taken


def _read_one(sources: Mapping[str, Any]) -> tuple[str, DeepSpeedConfig, list[str]]:
    """What messages call the config, the config, and its keys without effect.

    Args:
        sources: the user's, the launcher's or both, by what messages call them if they are no files.
    """
    named = [(str(source) if isinstance(source, str | Path) else place, source) for place, source in sources.items()]
    (name, config, idle), *others = [(name, *read_config(source, where=name)) for name, source in named]
    for other, theirs, _ in others:
        if theirs != config:
            raise UserError(
                f"Two DeepSpeed configs came that differ: {name} in the training settings, {other} by the launcher. One is accepted: take "
                "the first out, or start with torchrun, which brings none."
            )
    return name, config, idle


def _agreed(wanted: Iterable[Taken], given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings that the config wants, none of which contradicts another or one that was `given`."""
    found: dict[str, Taken] = {}
    for one in wanted:
        if one.key in given and not _is_same(given[one.key], one.value):
            raise UserError(
                f"{name}: '{one.source}' is {one.said}, but {one.key} is {given[one.key]} in the training settings. Change one of them, or "
                "write auto into the config."
            )
        other = found.setdefault(one.key, one)
        if other.value != one.value:
            raise UserError(f"{name}: '{one.source}' is {one.said}, but '{other.source}' is {other.said}. Write auto for one of them.")
    return {key: one.value for key, one in found.items()}


def _batches(config: DeepSpeedConfig, ours: TrainSettings, count: int, name: str, *, is_given: bool) -> Iterator[Taken]:
    """The sizes of batches: that of a step is that of a forward, times forwards, times processes. `is_given`: ours, by the user."""
    batch, micro, forwards = config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps
    if batch is not None:
        yield Taken("batch_size", batch, "train_batch_size", batch)
    if micro is not None:
        yield Taken("micro_batch_size", micro, "train_micro_batch_size_per_gpu", micro)
    micro = micro or ours.micro_batch_size
    said = f"{micro} (micro-batch) x {forwards or 1} (gradient_accumulation_steps) x {count} (processes)"
    if batch is None and not is_given and micro is not None:
        if forwards is not None or config.train_micro_batch_size_per_gpu is not None:
            yield Taken("batch_size", micro * (forwards or 1) * count, "train_micro_batch_size_per_gpu", said)
        return
    batch = batch or ours.batch_size
    if forwards is None or (forwards == 1 and micro is None):
        return  # a process's whole share in one forward is what no micro-batch means
    if micro is None:
        micro, rest = divmod(batch, forwards * count)
        if rest:
            raise UserError(
                f"{name}: 'gradient_accumulation_steps' is {forwards}, but a batch of {batch} cannot be cut into {forwards} x {count} "
                f"(processes). Take a multiple of {forwards * count}, or write auto."
            )
        yield Taken("micro_batch_size", micro, "gradient_accumulation_steps", forwards)
    elif micro * forwards * count != batch:
        raise UserError(f"{name}: {said} is {micro * forwards * count}, but the batch is {batch}. Change one of them, or write auto.")


def _spreading(config: DeepSpeedConfig) -> Iterator[Taken]:
    """What is spread over processes, and what is computed again or in bf16."""
    stage = config.zero_optimization.stage
    if stage is not None:
        yield Taken("shard", stage >= 2, "zero_optimization.stage", stage)
    if config.bf16.enabled is not None:
        yield Taken("mixed_precision", "bf16" if config.bf16.enabled else "no", "bf16.enabled", config.bf16.enabled)
    block = config.activation_checkpointing
    if block is not None and (block.partition_activations or block.contiguous_memory_optimization):
        yield Taken("activation_checkpointing", True, "activation_checkpointing", "on")


def _numbers(config: DeepSpeedConfig, ours: TrainSettings, name: str) -> Iterator[Taken]:
    """Of the optimizer and its rate."""
    clipping, adam = config.gradient_clipping, config.optimizer.params if config.optimizer is not None else None
    if clipping is not None:
        yield Taken("gradient_clip", clipping or None, "gradient_clipping", clipping)
    if adam is not None and adam.lr is not None:
        yield Taken("learning_rate", adam.lr, "optimizer.params.lr", adam.lr)
    if adam is not None and adam.weight_decay is not None:
        yield Taken("weight_decay", adam.weight_decay, "optimizer.params.weight_decay", adam.weight_decay)
    if adam is not None and adam.betas is not None:
        yield Taken("betas", adam.betas, "optimizer.params.betas", adam.betas)
    if config.scheduler is None:
        return
    kind, params = config.scheduler.type, config.scheduler.params
    yield Taken("schedule", SCHEDULES[kind], "scheduler.type", kind)
    if params.warmup_max_lr is not None:
        yield Taken("learning_rate", params.warmup_max_lr, "scheduler.params.warmup_max_lr", params.warmup_max_lr)
    if params.total_num_steps is not None:
        yield Taken("steps", params.total_num_steps, "scheduler.params.total_num_steps", params.total_num_steps)
    if params.warmup_num_steps is not None:
        steps = params.total_num_steps or ours.steps
        if params.warmup_num_steps > steps:
            raise UserError(
                f"{name}: 'scheduler.params.warmup_num_steps' is {params.warmup_num_steps}, but a task is trained for {steps} steps. "
                "Write fewer, or auto."
            )
        yield Taken("warmup_ratio", params.warmup_num_steps / steps, "scheduler.params.warmup_num_steps", params.warmup_num_steps)


def _is_same(own: Any, value: Any) -> bool:
    """Also for a ratio that was divided."""
    return own == value or (isinstance(own, float) and isinstance(value, float) and math.isclose(own, value))


def _place() -> tuple[int, int]:
    """Which process this is, and of how many."""
    from torch import distributed  # a recipe without a DeepSpeed config is read without torch

    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
