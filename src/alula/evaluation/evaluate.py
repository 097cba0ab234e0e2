"""One task, one model, one prediction for each test sample. It knows no method and writes no file."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Required, TypedDict

import torch
from torch import nn

from alula.data.ahead import made_ahead
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.evaluation.boxes import box_match
from alula.evaluation.generation import Around, Batch, BatchMaker, generate_answers, untouched
from alula.evaluation.prose import measure_prose
from alula.evaluation.ranking import check_options, option_rows, rank_options
from alula.evaluation.scores import Prediction, Scored, closed_answers, exact_match, normalise, prompt_text
from alula.training.processes import Team
from alula.training.sharding import is_sharded

Progress = Callable[[int, int], None]


class Answer(TypedDict, total=False):
    """What scoring one sample found: the measured fields of its `Prediction`."""

    output: Required[str]
    score: Required[float]
    parsed: bool
    options: tuple[str, ...]
    loss_bits: float
    bytes: int
    iou: float


def evaluate_task(
    model: nn.Module,
    collator: BatchMaker,
    task: Task,
    *,
    batch_size: int,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    method: str = "",
    limit: int | None = None,
    around: Around | None = None,
    team: Team | None = None,
) -> list[Prediction]:
    """The prediction for each test sample of `task`, in the order of `task.test`.

    Samples run sorted by length, longest first: little padding, and what does not fit fails at once. A thread makes the next
    batches meanwhile.

    Args:
        batch_size: rows in one forward; a ranked sample has one row for each of its options.
        device: None for the device of the model's first parameter.
        progress: called with the samples done and the samples in all, after each batch.
        seed: written into the predictions, like `method`; nothing here is random.
        limit: samples; only the first so many are used, None for all.
        around: gives a context for each batch, entered around `generate` or the forward. The batch holds `labels`
            where options or prose are measured.
        team: processes with the same model that call this together: each takes some of the batches, all get every
            prediction. A sharded model goes through every batch on all of them.

    Raises:
        UserError: a ranked sample without options, or whose answer is none of them.
    """
    samples = list(task.test)[:limit]
    make, answer = _answerer(task, samples, model, collator, device=_device(model, device), around=around or untouched)
    predictions: dict[int, Prediction] = {}
    was_training = model.training
    model.eval()
    try:
        batches = list(_batches(samples, batch_size, is_ranked=task.scoring == "ranked"))
        shares_batches = team is not None and not is_sharded(model)
        own = batches[team.index :: team.count] if team and shares_batches else batches
        chosen = [[samples[index] for index in batch] for batch in own]
        with contextlib.closing(made_ahead(make, chosen)) as made:
            for batch, rows, inputs in zip(own, chosen, made, strict=True):
                for index, found in zip(batch, answer(rows, inputs), strict=True):
                    predictions[index] = _prediction(task, samples[index], found, method=method, seed=seed)
                if progress is not None:
                    progress(len(predictions), len(samples))
    finally:
        model.train(was_training)
    for found_there in team.gather(predictions) if team and shares_batches else ():
        predictions |= found_there
    return [predictions[index] for index in range(len(samples))]


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    return next(model.parameters()).device if device is None else torch.device(device)


def _batches(samples: Sequence[Sample], batch_size: int, *, is_ranked: bool) -> Iterator[list[int]]:
    """Indices of samples that run together: at most `batch_size` rows, but at least one sample."""
    order = sorted(range(len(samples)), key=lambda index: -_length(samples[index]))
    batch: list[int] = []
    rows = 0
    for index in order:
        wanted = len(samples[index].options) if is_ranked else 1
        if batch and rows + wanted > batch_size:
            yield batch
            batch, rows = [], 0
        batch.append(index)
        rows += wanted
    if batch:
        yield batch


def _length(sample: Sample) -> int:
    """Characters, with an image counted as many: only the order matters."""
    return sum(len(message.content) for message in sample.messages) + 4096 * len(sample.images)


def _answerer(
    task: Task,
    samples: Sequence[Sample],
    model: nn.Module,
    collator: BatchMaker,
    *,
    device: torch.device,
    around: Around,
) -> tuple[Callable[[Sequence[Sample]], Batch], Callable[[Sequence[Sample], Batch], list[Answer]]]:
    """What turns samples into tensors, and both into answers, by the task's scoring."""
    if task.scoring == "ranked":
        check_options(samples)

        def rank(rows: Sequence[Sample], batch: Batch) -> list[Answer]:
            ranked = rank_options(model, collator, rows, device=device, around=around, rows=batch)
            return [_ranked(sample, values) for sample, values in zip(rows, ranked, strict=True)]

        return partial(option_rows, collator), rank
    if task.scoring == "bits_per_byte":

        def measure(rows: Sequence[Sample], batch: Batch) -> list[Answer]:
            measured = measure_prose(model, collator, rows, device=device, around=around, batch=batch)
            return [{"output": "", "score": bits / size, "loss_bits": bits, "bytes": size} for bits, size in measured]

        return collator, measure
    judge = box_match if task.scoring == "box_iou" else partial(exact_match, known_answers=closed_answers(task))

    def generate(rows: Sequence[Sample], batch: Batch) -> list[Answer]:
        said = generate_answers(model, collator, rows, max_new_tokens=task.max_new_tokens, device=device, around=around, batch=batch)
        return [_generated(text, judge(text, sample.references, ended=ended)) for sample, (text, ended) in zip(rows, said, strict=True)]

    return collator.prompts, generate


def _ranked(sample: Sample, values: Sequence[float]) -> Answer:
    best = sample.options[max(range(len(values)), key=values.__getitem__)]  # the first of equals
    right = normalise(best) in {normalise(reference) for reference in sample.references}
    return {"output": best, "score": float(right), "options": sample.options}


def _generated(text: str, scored: Scored) -> Answer:
    answer = Answer(output=text, score=scored.score, parsed=scored.parsed)
    if scored.iou is not None:
        answer["iou"] = scored.iou
    return answer


def _prediction(task: Task, sample: Sample, found: Answer, *, method: str, seed: int) -> Prediction:
    return Prediction(
        id=sample.id,
        task=task.name,
        prompt=prompt_text(sample),
        reference=sample.answer,
        method=method,
        seed=seed,
        **found,
    )
