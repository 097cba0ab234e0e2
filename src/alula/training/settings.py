"""How a task is trained, whatever the method. It knows no model."""

from math import cos, pi
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MM1 = "mm1"
"""The learning rate that follows from the backbone's size (`alula.methods.rates`)."""

BETAS = (0.9, 0.999)
Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(BaseModel):
    """The settings of the training loop; unknown keys are errors.

    Example:
        >>> TrainSettings(steps=100).batch_size
        16
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    steps: int = Field(60, ge=1)
    """Optimizer steps per task (1 or more). Default: a task of the embedded stream in about two minutes on two CPU cores."""

    batch_size: int = Field(16, ge=1)
    """Samples per optimizer step, summed over all processes (1 or more). Default ours."""

    micro_batch_size: int | None = Field(None, ge=1)
    """Samples per forward on one process; None: the process's whole share of the batch. Lower it when memory runs out."""

    learning_rate: Annotated[float, Field(gt=0)] | Literal["mm1"] = 6e-4
    """Peak rate of AdamW (above 0). Default ours, for low-rank experts; full fine-tuning wants about a tenth. ``mm1``: the rule of MM1
    for pre-training, by the backbone's size, which sets the weight decay too."""

    warmup_ratio: float = Field(0.1, ge=0, le=1)
    """Share of a stage's steps in which the rate rises linearly (0-1). Default ours."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """What the rate does after the warm-up: falls to zero along half a cosine, or stays."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW (0 or more). Default 0, as usual for low-rank experts."""

    betas: tuple[Beta, Beta] = BETAS
    """How much of AdamW's means of gradients and of their squares a step keeps (0 or more, below 1). Default torch's; language models
    and image encoders are often pre-trained with 0.9 and 0.95."""

    gradient_clip: float | None = Field(1.0, gt=0)
    """Largest norm of the whole gradient (above 0); None: no clipping. Default 1, as usual for transformers."""

    mixed_precision: Literal["no", "bf16"] = "no"
    """With bf16, forward passes run under autocast; weights and optimizer keep their dtype."""

    seed: int = Field(0, ge=0)
    """Seeds sample order, the birth of new modules and dropout (0 or more)."""

    save_every: int | None = Field(None, ge=1)
    """Steps between checkpoints within a stage; None: only after each task."""

    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory."""

    shard: bool = False
    """Spread the model's own weights over the processes (FSDP2): each keeps its part and gathers one decoder layer at a time."""

    log_every: int = Field(1, ge=1)
    """Steps between two rows of losses.jsonl (1 or more); the last step of a stage is always recorded."""

    num_workers: int = Field(0, ge=0)
    """Processes that make batches ahead (0 or more); 0: one thread of the training process does, two steps ahead."""

    @property
    def rate(self) -> float:
        """The peak rate as a number; a method's and a trainer's settings have one."""
        assert not isinstance(self.learning_rate, str), "alula.methods.rates.resolve_rate was not called"
        return self.learning_rate

    def rate_factor(self, step: int, *, steps: int) -> float:
        """The share (0-1) of a stage's peak rate that `step`, counted from 0, is taken with."""
        warmup = round(self.warmup_ratio * steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)  # not step / warmup: a step at rate zero would be a wasted one
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + cos(pi * (step - warmup) / max(1, steps - warmup)))
