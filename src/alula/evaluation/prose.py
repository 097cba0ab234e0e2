"""How well a model predicts prose: bits for each byte, a meter that sees forgetting before answers change."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from alula.data.sample import Sample
from alula.evaluation.generation import Around, Batch, BatchMaker, on_device, untouched
from alula.evaluation.ranking import target_costs


def prose_bytes(sample: Sample) -> int:
    """UTF-8 bytes of every assistant turn: the text whose tokens are targets."""
    return sum(len(message.content.encode()) for message in sample.messages if message.role == "assistant")


def measure_prose(
    model: nn.Module,
    collator: BatchMaker,
    samples: Sequence[Sample],
    *,
    device: torch.device,
    around: Around = untouched,
    batch: Batch | None = None,
) -> list[tuple[float, int]]:
    """Bits of all targets of each sample, and the bytes they stand for.

    Bits per byte is comparable between tokenizers, perplexity per token is not. The token that ends a turn is a target
    like the others: its bits count, and it has no bytes. The first token of running text is predicted from nothing: its
    bytes count, it has no bits. Both are the same for every model with that tokenizer.
    Source: The Pile (Gao et al. 2020), section 3.1, arXiv 2101.00027.

    Args:
        batch: what the collator made of the samples; None: it is made here.
    """
    costs, _ = target_costs(model, on_device(collator(samples) if batch is None else batch, device), around=around)
    bits: torch.Tensor = costs / math.log(2)
    return [(cost, prose_bytes(sample)) for cost, sample in zip(bits.tolist(), samples, strict=True)]
