"""What a DeepSpeed config says: the keys that count here, those that only tune, those that ask for another training. It needs no DeepSpeed.

Source: https://www.deepspeed.ai/docs/config-json, and the reader of DeepSpeed 0.19.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from alula.data.checking import check
from alula.errors import UserError, nearest
from alula.files import read_json

AUTO = "auto"
SCHEDULES = {"WarmupLR": "constant", "WarmupCosineLR": "cosine"}  # DeepSpeed's names and the loop's

Count = Annotated[int, Field(ge=1)]

TUNING = """
    steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level timers flops_profiler comms_logger disable_python_gc
    communication_data_type seq_parallel_communication_data_type disable_allgather prescale_gradients gradient_predivide_factor aio
    checkpoint nebula use_node_local_storage dataloader_drop_last data_types gradient_accumulation_dtype managed_gradient_accumulation
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer graph_harvesting compile
"""
"""What makes DeepSpeed faster, says more or stores otherwise; FSDP2 has no such switches."""

ZERO_TUNING = """
    contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce allgather_partitions allgather_bucket_size
    overlap_comm load_from_fp32_weights elastic_checkpoint sub_group_size round_robin_gradients ignore_unused_parameters leaf_module
    stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters
    stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
    stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential log_trace_cache_warnings
    memory_efficient_linear override_module_apply zero_hpz_partition_size mics_shard_size mics_hierarchical_params_gather
    cpu_offload_use_pin_memory legacy_stage1 pipeline_loading_checkpoint param_persistence_threshold
"""

LESS_MEMORY = "train.shard over more processes, a lower micro_batch_size, activation_checkpointing or dtype: 4bit save memory"
BF16 = 'write "bf16": {"enabled": true}, which needs no loss scaling'
SPREADING = "a large model is spread by ZeRO stage 2 or 3 (train.shard)"
TRACKERS = "name it in the recipe's trackers"
DATA = "the recipe's tasks say which data comes when"
REFUSED = {
    "amp": BF16,
    "torch_autocast": BF16,
    "compression_training": LESS_MEMORY,
    "quantize_training": LESS_MEMORY,
    "weight_quantization": LESS_MEMORY,
    "pipeline": SPREADING,
    "tensor_parallel": SPREADING,
    "sequence_parallel_size": SPREADING,
    "tensorboard": TRACKERS,
    "wandb": TRACKERS,
    "comet": TRACKERS,
    "data_efficiency": DATA,
    "curriculum_learning": DATA,
    "csv_monitor": "losses.jsonl holds every loss",
    "expert_parallel": "experts are alula's own (alula.attach, or upcycle in a recipe)",
    "elasticity": "the same command goes on with another number of processes",
    "autotuning": "choose the sizes yourself",
    "hybrid_engine": "it is for generation while training",
    "progressive_layer_drop": "all layers train",
    "eigenvalue": "it is for compression",
    "sparse_attention": "load_model takes another attention",
    "sparse_gradients": "gradients are dense",
}
"""What would be another training; and what to do instead."""
ZERO_REFUSED = {
    "offload_optimizer": LESS_MEMORY,
    "offload_param": LESS_MEMORY,
    "cpu_offload": LESS_MEMORY,
    "cpu_offload_param": LESS_MEMORY,
    "zenflow": LESS_MEMORY,
    "super_offload": LESS_MEMORY,
    "zero_quantized_weights": LESS_MEMORY,
    "zero_quantized_gradients": LESS_MEMORY,
    "zero_quantized_nontrainable_weights": LESS_MEMORY,
}


class Block(BaseModel):
    """A part of a config: fields that count here, and others, each of which is known to be tuning or refused."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    tuning: ClassVar[str] = ""
    refused: ClassVar[Mapping[str, str]] = {}

    def idle(self, where: str, *, path: str = "") -> Iterator[str]:
        """The keys that are given and have no effect.

        Raises:
            UserError: a key that is unknown, or asks for what alula does not do.
        """
        for key, value in (self.model_extra or {}).items():
            if key in self.refused:
                if is_on(value):
                    raise UserError(f"{where}: '{path}{key}' is on, which alula's loop does not have: {self.refused[key]}. Take it out.")
            elif key in self.tuning.split():
                yield f"{path}{key}"
            else:
                known = {*type(self).model_fields, *self.tuning.split(), *self.refused}
                raise UserError(f"{where}: unknown key '{path}{key}'. {nearest(key, known)}")
        for key in type(self).model_fields:
            if isinstance(inner := getattr(self, key), Block):
                yield from inner.idle(where, path=f"{path}{key}.")


class Switch(Block):
    """``bf16`` or ``fp16``."""

    tuning = """
        loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis min_loss_scale auto_cast check_overflow
        immediate_grad_update fp16_master_weights_and_grads bf16_master_weights_and_grads bf16_optimizer_states
        """

    enabled: bool | None = None
    """None: the recipe says."""


class Zero(Block):
    """What is spread over the processes."""

    tuning = ZERO_TUNING
    refused = ZERO_REFUSED

    stage: Literal[0, 1, 2, 3] | None = None
    """0 and 1 are data-parallel here, 2 and 3 sharded."""


class Adam(Block):
    """``optimizer.params``."""

    tuning = "torch_adam fused"

    lr: float | None = None
    """Peak rate."""

    weight_decay: float | None = None
    """Decoupled."""

    betas: tuple[float, float] | None = None
    """Of the means of gradients and of their squares."""

    eps: float = 1e-8
    """Only that of torch."""

    adam_w_mode: bool = True
    """False: a decay of the gradient, which is refused."""


class Optimizer(Block):
    """AdamW, which DeepSpeed also calls Adam."""

    tuning = "legacy_fusion"

    type: str = "AdamW"
    params: Adam = Field(default_factory=Adam)
    """Its keywords."""


class Warmup(Block):
    """``scheduler.params``."""

    tuning = "warmup_min_lr warmup_min_ratio cos_min_ratio warmup_type last_batch_iteration"

    warmup_max_lr: float | None = None
    """Peak rate."""

    warmup_num_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps in which the rate rises."""

    total_num_steps: Count | None = None
    """Steps in all."""


class Scheduler(Block):
    """What the rate does after the warm-up."""

    type: str
    """Its name."""

    params: Warmup = Field(default_factory=Warmup)
    """Its keywords."""


class Activations(Block):
    """How DeepSpeed recomputes activations; any switch that is on means that it does."""

    tuning = "synchronize_checkpoint_boundary profile number_checkpoints"
    refused: ClassVar[Mapping[str, str]] = {"cpu_checkpointing": LESS_MEMORY}

    partition_activations: bool = False
    """Over tensor-parallel processes, of which there are none here."""

    contiguous_memory_optimization: bool = False
    """Where they are kept."""


class DeepSpeedConfig(Block):
    """The fields of a DeepSpeed config that say how to train; ``auto`` was taken out. None: the recipe says."""

    tuning = TUNING
    refused = REFUSED

    train_batch_size: Count | None = None
    """Samples per optimizer step over all processes."""

    train_micro_batch_size_per_gpu: Count | None = None
    """Samples per forward on one process."""

    gradient_accumulation_steps: Count | None = None
    """Forwards per optimizer step on one process."""

    gradient_clipping: Annotated[float, Field(ge=0)] | None = None
    """Largest norm; 0: no clipping."""

    zero_optimization: Zero = Field(default_factory=Zero)
    """See `Zero`."""

    bf16: Switch = Field(default_factory=Switch)
    """See `Switch`."""

    fp16: Switch = Field(default_factory=Switch)
    """Refused when it is on."""

    optimizer: Optimizer | None = None
    """See `Optimizer`."""

    scheduler: Scheduler | None = None
    """See `Scheduler`."""

    activation_checkpointing: Activations | None = None
    """See `Activations`."""


def read_config(source: Any, *, where: str) -> tuple[DeepSpeedConfig, list[str]]:
    """The config, and those of its keys that have no effect here.

    Args:
        source: a JSON file, or what stands in one.
        where: what messages call it, if it is no file.

    Raises:
        UserError: no such file, not a config, an unknown key or value, or a wish for what alula's loop does not do.
    """
    if isinstance(source, str | Path):
        where, source = str(source), read_json(source)
    if not isinstance(source, dict):
        raise UserError(f"{where}: {type(source).__name__} came, a DeepSpeed config (a file, or a mapping) is wanted. Write one.")
    config = check(DeepSpeedConfig, _without_auto(source), where)
    idle = list(config.idle(where))
    if config.fp16.enabled:
        raise UserError(f"{where}: 'fp16' is on; alula's loop scales no losses, which fp16 needs. Take it out, and {BF16}.")
    _refuse_others(config, where)
    return config, idle


def is_on(value: Any) -> bool:
    """Whether a key's value asks for something: not so are false, none, a size of one, and blocks that are not enabled.

    Example:
        >>> is_on({"device": "cpu"}), is_on({"device": "none"}), is_on({"enabled": False, "seed": 7}), is_on(1)
        (True, False, False, False)
    """
    if isinstance(value, Mapping):
        return is_on(value["enabled"] if "enabled" in value else value["device"] if "device" in value else list(value.values()))
    if isinstance(value, list):
        return any(map(is_on, value))
    return value is True or value not in (None, False, 0, 1, "", "none")


def _refuse_others(config: DeepSpeedConfig, where: str) -> None:
    """Refuses optimizers other than the loop's, and schedules that it does not have."""
    schedule = config.scheduler.type if config.scheduler is not None else None
    if schedule not in (None, *SCHEDULES):
        raise UserError(
            f"{where}: 'scheduler' is {schedule}; alula's loop has {' and '.join(SCHEDULES)}. Write one of them, or take 'scheduler' out "
            "and set train.schedule."
        )
    optimizer = config.optimizer or Optimizer()
    params = optimizer.params
    if optimizer.type.lower() not in ("adam", "adamw") or not params.adam_w_mode:
        raise UserError(
            f"{where}: 'optimizer' is {optimizer.type} with adam_w_mode {params.adam_w_mode}; alula's loop has AdamW, whose decay is "
            "decoupled. Write that, or take 'optimizer' out."
        )
    if params.eps != 1e-8:
        raise UserError(f"{where}: 'optimizer.params' has eps {params.eps}; alula's AdamW has 1e-08. Write that, or auto.")


def _without_auto(value: Any) -> Any:
    """`value` without the keys that say ``auto``."""
    if not isinstance(value, Mapping):
        return value
    return {key: _without_auto(inner) for key, inner in value.items() if inner != AUTO}
