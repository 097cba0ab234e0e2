"""Daily use of a pool: learn one more task without old data, ask a question, score what is there."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from alula.attach import Mixtures, attach
from alula.context import BASE
from alula.data.collate import Collator
from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.evaluation.evaluate import evaluate_task
from alula.evaluation.scores import score_task
from alula.files import write_jsonl
from alula.methods import Arm
from alula.methods.routed import Routed
from alula.models import load_model
from alula.pool import MANIFEST, Pool
from alula.routers.named import ROUTINGS
from alula.running.diagnosis import log_weights
from alula.training import Trainer, TrainSettings


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A base model with a pool's experts on it."""

    model: Any
    processor: Any
    mixtures: Mixtures
    pool: Pool


def open_pool(folder: Path | str, *, model_name: str | None = None, dtype: str = "auto", device: str | None = None) -> Opened:
    """Loads the pool's base model (or `model_name`) and attaches every expert.

    Raises:
        UserError: no pool, or another base model than the pool's.
    """
    pool = Pool.open(folder)
    model, processor = load_model(model_name or pool.base, dtype=dtype, device=device)
    return Opened(model=model, processor=processor, mixtures=pool.attach(model), pool=pool)


def learn_task(
    model_name: str,
    pool_folder: Path | str,
    task: Task,
    *,
    settings: TrainSettings | None = None,
    rank: int = 8,
    linears: list[str] | str | None = None,
    layers: list[int] | None = None,
    router: str = "analytic",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Adds one task to a pool (made if there is none) without any data of earlier tasks.

    Args:
        model_name: the base model; must be the pool's.
        linears, layers: where experts sit; only for a new pool, which keeps them.
        router: one of `ROUTINGS`; only for a new pool.

    Returns:
        the task's score before and after, with sample counts, as kept in the pool's manifest.

    Raises:
        UserError: another base model than the pool's, a task name that is taken, data that cannot be used.
    """
    if router not in ROUTINGS:
        raise UserError(f"Unknown router '{router}'. Known: {', '.join(ROUTINGS)}.")
    settings, folder = settings or TrainSettings(), Path(pool_folder)
    model, processor = load_model(model_name, dtype=dtype)
    if (folder / MANIFEST).exists():
        pool = Pool.open(folder)
        if task.name in pool.names:
            raise UserError(f"The pool {folder} knows a task '{task.name}' already. Choose another name for the new one.")
        mixtures, arms = pool.attach(model), (pool.arm,)
    else:
        pool, mixtures, arms = None, attach(model, linears=linears, layers=layers), (router,)
    collator = Collator(processor)
    method = Routed(model, settings=settings, rank=rank, arms=arms, mixtures=mixtures)
    before = _score(model, collator, task, settings.seed, None)[0]
    work = folder / "learning" / task.name
    trainer = Trainer(model, method, collator, settings=settings, folder=work, progress=progress, identity=model_name)
    (learnt,) = list(trainer.learn(Stream(tasks=(task,))))
    after, predictions = _score(model, collator, task, settings.seed, method.arms()[0])
    about = {
        "samples": len(task.train),
        "steps": settings.steps,
        "before": before,
        "after": after,
        "test_samples": len(task.test),
        "cost": learnt.cost.row(),
        "seed": settings.seed,
    }
    if pool is None:
        pool = Pool.create(folder, mixtures, base=model_name, linears=linears, layers=layers, arm=router)
    pool.add(mixtures, task.name, about=about)
    write_jsonl(pool.expert_folder(task.name) / "predictions.jsonl", [found.as_row() for found in predictions])
    return about


def _score(model: Any, collator: Collator, task: Task, seed: int, arm: Arm | None) -> tuple[float | None, list]:
    if not task.test:
        return None, []
    arm = arm or Arm(name="default", enter=_as_it_is)
    with arm.enter(task):
        found = evaluate_task(model, collator, task, batch_size=16, seed=seed, around=arm.around)
    return score_task(task, found).score, found


def _as_it_is(task: Task) -> Any:
    return contextlib.nullcontext()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer, and who gave it.

    Attributes:
        shares: mean weight of each expert (and the base model) over all tokens and sites.
        tokens: each token of prompt and answer, with the name of the expert that had most weight on it.
        seconds: wall time of the generation.
    """

    text: str
    shares: dict[str, float]
    tokens: list[tuple[str, str]]
    seconds: float


@torch.no_grad()
def generate(opened: Opened, question: str, *, images: tuple[Path, ...] = (), max_new_tokens: int = 64) -> Reply:
    """The greedy answer of a pool to one question about any number of images."""
    collator = Collator(opened.processor)
    model, mixtures = opened.model, opened.mixtures
    device = next(model.parameters()).device
    sample = Sample.ask(question, "?", images=images, origin="your question")
    prompt = {key: value.to(device) for key, value in collator.prompts([sample]).items()}
    started = time.perf_counter()
    out = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    seconds = time.perf_counter() - started
    new = out[0, prompt["input_ids"].shape[1] :]
    text = collator.tokenizer.decode(new, skip_special_tokens=True).strip()
    if not mixtures.names:
        return Reply(text=text, shares={BASE: 1.0}, tokens=[], seconds=seconds)
    task = Task(name="question", train=[], test=[])
    arm = Arm(name="pool", enter=_as_it_is, around=mixtures.director.on_prompts)
    weights = log_weights(mixtures, model, prompt, arm, task).tokens()[0]
    names = [*mixtures.names, BASE]
    shares = dict(zip(names, weights.mean(dim=0).tolist(), strict=True))
    image = mixtures.anatomy.image_mask(prompt["input_ids"])[0].tolist()
    said = ["[image]" if is_image else collator.tokenizer.decode([i]) for i, is_image in zip(prompt["input_ids"][0].tolist(), image, strict=True)]
    speakers = [names[int(index)] for index in weights.argmax(dim=-1)]
    return Reply(text=text, shares=shares, tokens=list(zip(said, speakers, strict=True)), seconds=seconds)


def score_pool(opened: Opened, tasks: list[Task], *, out: Path, limit: int | None = None, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Scores the pool on tasks and keeps every prediction in `out`."""
    collator, rows = Collator(opened.processor), []
    for task in tasks:
        bar = progress.add_task(f"scoring {task.name}", total=len(task.test[:limit])) if progress else None
        found = evaluate_task(
            opened.model,
            collator,
            task,
            batch_size=16,
            limit=limit,
            around=opened.mixtures.director.on_prompts,
            progress=(lambda done, total, bar=bar: progress.update(bar, completed=done)) if progress else None,
        )
        write_jsonl(out / f"{task.name}.jsonl", [prediction.as_row() for prediction in found])
        rows.append({"task": task.name, **vars(score_task(task, found))})
    return rows
