"""Greedy answers of any Hugging Face vision-language model. It knows no scores."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn

from alula.data.sample import Sample

Batch = dict[str, Tensor]
Around = Callable[[Batch], AbstractContextManager[object]]


class BatchMaker(Protocol):
    """What evaluation needs of a collator: three batches and the processor that reads tokens back."""

    @property
    def processor(self) -> Any:
        """A processor of Transformers, or a bare tokenizer."""

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Whole conversations with labels."""

    def prompts(self, samples: Sequence[Sample]) -> Batch:
        """Conversations up to the answer, padded on the left."""

    def continuations(self, samples: Sequence[Sample], options: Sequence[Sequence[str]]) -> Batch:
        """One row for each sample and option, with labels on the option."""


def untouched(batch: Batch) -> AbstractContextManager[object]:
    """The context that changes nothing: a model runs as it is."""
    return nullcontext()


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def ending_tokens(model: nn.Module, tokenizer: object) -> set[int]:
    """Ids of the tokens that end an answer, from the model's generation config and its tokenizer."""
    ids: set[int] = set()
    for owner in (getattr(model, "generation_config", None), tokenizer):
        found = getattr(owner, "eos_token_id", None)
        ids |= set() if found is None else {found} if isinstance(found, int) else set(found)
    return ids


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    collator: BatchMaker,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    device: torch.device,
    around: Around = untouched,
    batch: Batch | None = None,
) -> list[tuple[str, bool]]:
    """The greedy answer to each sample, and whether it ended before `max_new_tokens` tokens.

    All rows have ended when the last one has: nothing is generated after that.

    Args:
        around: gives a context for the prompts batch, entered around `generate` (to fix routes, to count).
        batch: what `collator.prompts` made of the samples; None: it is made here.
    """
    tokenizer = getattr(collator.processor, "tokenizer", collator.processor)
    prompts = on_device(collator.prompts(samples) if batch is None else batch, device)
    ends = ending_tokens(model, tokenizer)
    given = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(ends) or None}
    options = {name: value for name, value in given.items() if value is not None}
    generate: Any = model.generate  # every unknown attribute of a module is a Tensor or a module to type checkers
    with around(prompts):
        whole: Int[Tensor, "batch tokens"] = generate(**prompts, max_new_tokens=max_new_tokens, do_sample=False, **options)
    answers = whole[:, prompts["input_ids"].shape[1] :]  # prompts are padded on the left: all answers start together
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [(text.strip(), not ends.isdisjoint(row)) for text, row in zip(texts, answers.tolist(), strict=True)]
