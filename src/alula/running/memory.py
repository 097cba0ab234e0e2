"""How much memory training takes, before any training: weights, what trains, and what one batch keeps for the backward pass."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from alula.data.collate import Collator
from alula.data.forecast import DecoderShape, RowForecast
from alula.data.sample import Sample
from alula.models import anatomy
from alula.training import TrainSettings

CHECKPOINTED = 17
"""Activation checkpointing leaves about one part in so many (see `DecoderShape.batch_bytes`)."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a loaded model and of a batch.

    Attributes:
        model: all of it.
        decoder: its decoder.
        rank: an expert of rank 1 on every linear of the decoder, in float32.
        batch: activations and logits of one forward.
    """

    model: int
    decoder: int
    rank: int
    batch: int


def measure_sizes(model: PreTrainedModel, *, settings: TrainSettings, tokens: int) -> Sizes:
    """The sizes of a model that is loaded, and of a forward with rows of `tokens` tokens."""
    parts = anatomy(model)
    decoder = sum(_bytes(parameter) for path, parameter in model.named_parameters() if parts.part_of(path) == "decoder")
    low_rank = sum(linear.in_features + linear.out_features for linear in parts.linears(model).values())
    shape = DecoderShape(
        hidden_size=parts.hidden_size,
        num_layers=parts.num_layers,
        vocab_size=model.config.get_text_config(decoder=True).vocab_size,
        value_bytes=2 if settings.mixed_precision == "bf16" else model.dtype.itemsize,
    )
    batch = batch_bytes(shape, settings, tokens=tokens)
    return Sizes(model=sum(map(_bytes, model.parameters())), decoder=decoder, rank=4 * low_rank, batch=batch)


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()


def batch_bytes(shape: DecoderShape, settings: TrainSettings, *, tokens: int) -> int:
    """What one forward of a training with `settings` keeps for the backward pass, its rows padded to `tokens` tokens."""
    rows = settings.micro_batch_size or settings.batch_size
    whole, logits = (each.batch_bytes(rows, tokens) for each in (shape, replace(shape, num_layers=0)))
    return logits + (whole - logits) // CHECKPOINTED if settings.activation_checkpointing else whole


def longest_row(processor: ProcessorMixin, samples: Iterable[Sample]) -> int:
    """Tokens of the longest of `samples`, those of its images too.

    Raises:
        UserError: a sample that the processor cannot take.
    """
    forecast = RowForecast(Collator(processor))
    return max(forecast.text(sample) + forecast.visual([image.size for image in sample.open_images()]) for sample in samples)


def estimate_memory(sizes: Sizes, *, rank: int | None, num_experts: int) -> int:
    """Bytes of weights and experts, of gradients and AdamW's two moments of what trains, and of a batch; the encoder's come on top.

    Args:
        rank: of the expert that trains; None: the whole decoder trains, and there is no expert.
        num_experts: that stay in memory.
    """
    expert = sizes.rank * (rank or 0)
    return sizes.model + num_experts * expert + 3 * (sizes.decoder if rank is None else expert) + sizes.batch
