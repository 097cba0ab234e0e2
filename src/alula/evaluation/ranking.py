"""Likelihoods of given texts: which option a model finds most likely, and how many nats its targets cost."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from alula.data.sample import Sample
from alula.errors import UserError
from alula.evaluation.generation import Around, Batch, BatchMaker, on_device, untouched
from alula.evaluation.scores import normalise
from alula.models.logits import keeping
from alula.objectives.next_token import IGNORED, at_targets, columns_needed


@torch.no_grad()
def target_costs(model: nn.Module, batch: Batch, *, around: Around = untouched) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Nats of the targets (`labels != -100`) of each row, summed, and how many targets the row has.

    Scores are made only from the first target on, where the model can, and the log-softmax (fp32) only where a target is.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    with around(batch):
        logits: Float[Tensor, "batch last vocab"] = model(**inputs, **keeping(model, columns_needed(labels))).logits
    scores, targets = at_targets(logits, labels)
    chosen = scores.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    counted = labels[:, 1:] != IGNORED
    costs = torch.zeros(len(labels), dtype=torch.float32, device=chosen.device)
    costs.index_add_(0, counted.nonzero()[:, 0], -chosen)
    return costs, counted.sum(-1)


def option_rows(collator: BatchMaker, samples: Sequence[Sample]) -> Batch:
    """One row for each option of each sample."""
    return collator.continuations(samples, [sample.options for sample in samples])


def rank_options(
    model: nn.Module,
    collator: BatchMaker,
    samples: Sequence[Sample],
    *,
    device: torch.device,
    around: Around = untouched,
    rows: Batch | None = None,
) -> list[list[float]]:
    """The length-normalised log-likelihood (nats a token) of every option of every sample.

    Args:
        rows: what `option_rows` made of the samples; None: it is made here.

    Source: length normalisation as `acc_norm` in lm-evaluation-harness, by tokens where that divides by bytes.
    """
    batch = on_device(option_rows(collator, samples) if rows is None else rows, device)
    costs, lengths = target_costs(model, batch, around=around)
    flat = iter((-costs / lengths.clamp(min=1)).tolist())
    return [[next(flat) for _ in sample.options] for sample in samples]


def check_options(samples: Sequence[Sample]) -> None:
    """Refuses samples that cannot be ranked.

    Raises:
        UserError: a sample has fewer than two options, or its answer is none of them.
    """
    for sample in samples:
        where = sample.origin or sample.id
        if len(sample.options) < 2:
            raise UserError(
                f"{where}: {len(sample.options)} options came, ranked scoring wants at least two. "
                "Give the sample's `options`, or score the task by exact_match."
            )
        if normalise(sample.answer) not in {normalise(option) for option in sample.options}:
            raise UserError(
                f"{where}: the answer {sample.answer!r} is none of the options {list(sample.options)}. "
                "Ranked scoring wants it among them: correct the answer or the options."
            )
