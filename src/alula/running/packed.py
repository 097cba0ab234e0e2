"""Packed training in a run (``train.pack``): which methods and models may have it. What would mix samples is refused, not approximated."""

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from alula.data.collate import IGNORED, Collator
from alula.data.packing import Batch, PackingCollator
from alula.data.sample import Sample
from alula.errors import UserError
from alula.methods import IA3, Method
from alula.methods.full import FullDecoder
from alula.methods.one_lora import OneLoRA

TAKE_ROWS = (FullDecoder, OneLoRA, IA3)
"""Methods to which a token is a token, whatever stands in its row; others decide or prepend something for each row."""
TOLERANCE = {torch.float32: 1e-3}
COARSE = 5e-2
"""Largest difference of packed and single logits, as a share of the largest logit; the second for half precision."""


def refuse_rows(name: str, kind: type[Method]) -> None:
    """Refuses methods that take a row for one sample.

    Raises:
        UserError: such a method.
    """
    if not issubclass(kind, TAKE_ROWS):
        raise UserError(
            f"train.pack came for method '{name}', to which each row is one sample: it would take several for one. Take pack out, or "
            "use a method that trains weights alone (finetune_full, joint_full, lora, finetune, joint, ia3)."
        )


def packing_collator(model: nn.Module, collator: Collator, samples: Sequence[Sample], *, max_length: int) -> PackingCollator:
    """What makes batches in rows of `max_length` tokens; tried on two of `samples` first.

    Raises:
        UserError: samples in one row see one another in this model, or it takes no such rows.
    """
    positions = _axes(model)
    if len(samples) > 1:
        _try(model, collator, samples[:2], positions)
    return PackingCollator(collator, max_length=max_length, form="mask", positions=positions)


def _axes(model: nn.Module) -> Callable[[Batch], Tensor] | None:
    """The positions of a row on several axes, for models whose images have places in two dimensions; None for others."""
    owner = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
    if owner is None:
        return None
    index: Callable[..., tuple[Tensor, Tensor]] = owner.get_rope_index  # type: ignore[assignment]
    names = inspect.signature(index).parameters
    return lambda row: index(**{name: row[name] for name in names if name in row})[0]


@torch.no_grad()
def _try(model: nn.Module, collator: Collator, pair: Sequence[Sample], positions: Callable[[Batch], Tensor] | None) -> None:
    """Two samples in one row must say what each says alone, and the second must not change with a word of the first."""
    alone = [collator([sample]) for sample in pair]
    lengths = [row["input_ids"].shape[1] for row in alone]
    row = PackingCollator(collator, max_length=sum(lengths), form="mask", positions=positions)(pair)
    changed = {**row, "input_ids": row["input_ids"].clone()}
    place = int((alone[0]["labels"][0] != IGNORED).nonzero()[-1])
    others = row["input_ids"][row["labels"] != IGNORED]  # words of answers: none stands for an image
    differing = others[others != row["input_ids"][0, place]]
    changed["input_ids"][0, place] = differing[0] if len(differing) else row["input_ids"][0, place] + 1
    was_training = model.training
    model.eval()
    try:
        first, second = _logits(model, row).split(lengths)
        then = _logits(model, changed).split(lengths)[1]
        single = [_logits(model, each) for each in alone]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"train.pack came, but {type(model).__name__} takes no packed rows ({type(error).__name__}: {error}). Take pack out."
        ) from error
    finally:
        model.train(was_training)
    scale, tolerance = single[1].abs().max(), TOLERANCE.get(first.dtype, COARSE)
    apart = max(float((mine - own).abs().max() / scale) for mine, own in ((first, single[0]), (second, single[1]), (second, then)))
    if not apart <= tolerance:
        raise UserError(
            f"train.pack came, but in {type(model).__name__} samples of one row change one another (by {apart:.2g} of the largest "
            "logit). It has layers that no mask keeps apart, such as linear or cross attention. Take pack out."
        )


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Of the only row of `batch`: tokens x vocabulary."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits[0]
