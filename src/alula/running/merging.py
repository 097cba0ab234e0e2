"""A pool leaves as a plain model: a weighted set of experts in the base's own weights, for every program that knows the base."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from alula.errors import UserError
from alula.mixture import Mixtures
from alula.models import load_model
from alula.pool import Pool
from alula.pool.export import new_folder


def merge_pool(
    folder: Path | str,
    weights: Mapping[str, float],
    out: Path | str,
    *,
    model_name: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> type[nn.Module]:
    """Adds experts to the base model's weights and saves model and processor into the new folder `out`.

    Sums are in float32. Routing is lost: the set speaks on every token, with these weights.

    Args:
        weights: per expert; 1.0 is the expert as it was trained.
        dtype: of the saved model; auto is as in `load_model`.

    Returns:
        the model's class, which whoever loads the folder needs.

    Raises:
        UserError: no such pool or expert, learners, shared or quantised weights, or there is something at `out`.
    """
    pool = Pool.open(folder)
    if pool.learner_names:
        raise UserError(
            f"The pool {folder} holds learners, which attend to images beside the base model's layers: no weight of the base model "
            "can take them up. Use it with alula, or learn LoRA experts: alula learn --method routed."
        )
    if not weights:
        raise UserError(f"No expert came; {folder} has {', '.join(pool.names) or 'none'}. Name at least one: --expert NAME or NAME=0.5.")
    for name in weights:
        pool.expert_folder(name)
    with new_folder(out) as filling:
        model, processor = load_model(model_name or pool.base, dtype=dtype, device=device)
        mixtures = pool.attach(model)
        _refuse_shared(mixtures)
        mixtures.merge(weights)
        model.save_pretrained(filling)
        processor.save_pretrained(filling)
    return type(model)


def _refuse_shared(mixtures: Mixtures) -> None:
    """One matrix in two places would take up the updates of both."""
    hosts = {id(mixture.weight) for mixture in mixtures.sites.values()}
    ways: dict[int, list[str]] = {}
    for name, value in mixtures.model.named_parameters(remove_duplicate=False):
        if id(value) in hosts:
            ways.setdefault(id(value), []).append(name)
    shared = next((names for names in ways.values() if len(names) > 1), None)
    if shared:
        raise UserError(
            f"{' and '.join(shared)} are one tensor in this model, so an expert of one would change the other. "
            "Such a model cannot be merged: export the expert for PEFT instead (`alula export`)."
        )
