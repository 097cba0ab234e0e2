"""A PEFT adapter that was trained elsewhere joins a pool: its weights stay, only what routes to it is made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alula.context import BASE, Routing
from alula.data.collate import Collator
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks import general_prompts
from alula.errors import UserError
from alula.experts.lora import check_name
from alula.files import write_jsonl
from alula.methods import Arm
from alula.mixture import Mixtures, attach, observe
from alula.models import load_model
from alula.peft_format import read_adapter
from alula.pool import MANIFEST, Pool
from alula.pool.lock import locked
from alula.routers.named import ROUTINGS
from alula.running.learn import AFTER, BEFORE, absolute, score

ARM = "analytic_reject"
OBSERVED = 256
"""Training samples that the closed-form router looks at, as many as when a pool learns."""


def adopt(
    pool_folder: Path | str,
    adapter: Path | str,
    name: str,
    *,
    task: Task | None = None,
    model_name: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Adds a PEFT LoRA adapter to a pool (made if there is none) as expert `name`; nothing is trained.

    Args:
        task: samples of what the adapter is for. The closed-form router needs them; its test split gives the scores.
        model_name: the base model; None: the pool's. A new pool needs it.

    Returns:
        what the pool's manifest keeps: samples, and the score before and after.

    Raises:
        UserError: an adapter that is no plain LoRA or fits another model, a name that is taken, a router that needs data and got none.
    """
    check_name(name)
    folder = Path(pool_folder)
    with locked(folder, doing=f"adopting '{name}'"):
        pool = Pool.open(folder) if (folder / MANIFEST).exists() else None
        arm = pool.arm if pool else ARM
        if pool and name in pool.names:
            raise UserError(f"The pool {folder} has an expert '{name}' already. Choose another name.")
        _check_arm(arm, task)
        if pool is None and model_name is None:
            raise UserError(f"There is no pool in {folder} yet, so its base model must be named: --model NAME-OR-FOLDER.")
        base = absolute(model_name or (pool.base if pool else ""))
        model, processor = load_model(base, dtype=dtype)
        mixtures, collator, routing = pool.attach(model) if pool else attach(model), Collator(processor), ROUTINGS[arm]
        if pool is None and (routing.router == "analytic" or routing.null == "zero_expert"):
            _watch(mixtures, BASE, general_prompts(), collator, routing)
        way = Arm(name=arm, enter=lambda _: mixtures.using(routing), around=mixtures.director.on_prompts)
        before, first = score(model, collator, task, seed, way if mixtures.names else None) if task else (None, [])
        read_adapter(mixtures, name, adapter)
        if task:
            _watch(mixtures, name, task.train[:OBSERVED], collator, routing)
        after, last = score(model, collator, task, seed, way) if task else (None, [])
        about: dict[str, Any] = {"samples": 0, "adopted": str(adapter), "before": before, "after": after}
        about |= {"observed": len(task.train[:OBSERVED]), "test_samples": len(task.test), "metric": task.scoring} if task else {}
        pool = pool or Pool.create(folder, mixtures, base=base, arm=arm)
        for file, found in ((BEFORE, first), (AFTER, last)):  # before `add`: an expert counts once the manifest names it
            write_jsonl(folder / "experts" / name / file, [prediction.as_row() for prediction in found])
        pool.add(mixtures, name, about=about)
    return about


def _check_arm(arm: str, task: Task | None) -> None:
    routing = ROUTINGS[arm]
    if routing.router == "gate":
        raise UserError(f"This pool routes by '{arm}', whose gates are trained with each expert. Adopt into a pool with another router.")
    if task is None and (routing.router == "analytic" or routing.level == "combined"):
        raise UserError(f"This pool routes by '{arm}', which must see some samples of what the adapter is for: --data file.jsonl.")


def _watch(mixtures: Mixtures, name: str, samples: Sequence[Sample], collator: Collator, routing: Routing) -> None:
    """Gathers what routes to an expert, 16 samples at a time."""
    tokens, device = routing.router == "analytic" and routing.level != "sample", next(mixtures.model.parameters()).device
    for start in range(0, len(samples), 16):
        batch = collator(list(samples[start : start + 16]))
        observe(mixtures, name, {key: value.to(device) for key, value in batch.items()}, tokens=tokens)
