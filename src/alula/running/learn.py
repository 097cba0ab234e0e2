"""Daily use of a pool: learn one more task without old data, ask a question, score what is there."""

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from alula.context import BASE
from alula.data.collate import Collator
from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.errors import UserError, nearest
from alula.evaluation.evaluate import evaluate_task
from alula.evaluation.prompts import with_prompt_hashes
from alula.evaluation.scores import Prediction, score_task
from alula.experts.lora import check_name
from alula.files import write_jsonl
from alula.learners import Learners
from alula.methods import Arm
from alula.methods.routed import Routed
from alula.mixture import Mixtures, attach
from alula.models import base_fingerprint, load_model
from alula.models.loading import EMBEDDED, values_fingerprint
from alula.pool import MANIFEST, Pool
from alula.routers.named import ROUTINGS
from alula.running.alone import alone
from alula.running.diagnosis import log_weights
from alula.training import Trainer, TrainSettings
from alula.training.processes import Team

BEFORE, AFTER = "before.jsonl", "predictions.jsonl"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A base model with a pool's experts, or its learners, on it; without a pool the model as it is."""

    model: Any
    processor: Any
    mixtures: Mixtures | None
    pool: Pool | None
    learners: Learners | None = None


def open_model(model_name: str, *, dtype: str = "auto", device: str | None = None) -> Opened:
    """A model without a pool."""
    model, processor = load_model(model_name, dtype=dtype, device=device)
    return Opened(model=model, processor=processor, mixtures=None, pool=None)


def open_pool(folder: Path | str, *, model_name: str | None = None, dtype: str = "auto", device: str | None = None) -> Opened:
    """Loads the pool's base model (or `model_name`) and attaches every expert.

    Raises:
        UserError: no pool, or another base model than the pool's.
    """
    pool = Pool.open(folder)
    model, processor = load_model(model_name or pool.base, dtype=dtype, device=device)
    mixtures = pool.attach(model)
    return Opened(model=model, processor=processor, mixtures=mixtures, pool=pool, learners=pool.attach_learners(model))


@alone
def learn_task(
    model_name: str | None,
    pool_folder: Path | str,
    task: Task,
    *,
    settings: TrainSettings | None = None,
    rank: int = 8,
    linears: list[str] | str | None = None,
    layers: list[int] | None = None,
    router: str | None = None,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Adds one task to a pool (made if there is none) without any data of earlier tasks.

    Interrupted, the same call goes on from the last checkpoint, below ``learning/`` in the pool. All processes of one launch
    (torchrun) call this together; the main one alone writes.

    Args:
        model_name: the base model; None: the pool's, or the embedded default for a new pool.
        linears, layers: where experts sit; None: where the pool's do, or all linears of the decoder for a new pool.
        router: one of `ROUTINGS`; None: the pool's, or ``analytic_reject`` for a new pool.

    Returns:
        the task's score before and after, with sample counts, as kept in the pool's manifest.

    Raises:
        UserError: another base model, place or router than the pool's, a name that is taken, data that cannot be used.
    """
    settings, folder, team = settings or TrainSettings(), Path(pool_folder), Team()
    pool = Pool.open(folder) if (folder / MANIFEST).exists() else None
    _check_new(task.name, pool, folder, linears=linears, layers=layers, router=router)
    team.wait()  # until all have seen the pool as it is
    base = absolute(model_name or (pool.base if pool else EMBEDDED))
    model, processor = load_model(base, dtype=dtype)
    mixtures = pool.attach(model) if pool else attach(model, linears=linears, layers=layers)
    arm, collator = pool.arm if pool else router or "analytic_reject", Collator(processor)
    method = Routed(model, settings=settings, rank=rank, arms=(arm,), mixtures=mixtures)
    prints: dict[str, Any] = {}
    if team.count > 1:  # now: what is sharded in training cannot be read
        prints = {"fingerprint": base_fingerprint(model), "values": values_fingerprint(model)}
    before, first = score(model, collator, task, settings.seed, method.arms()[0] if mixtures.names else None, team=team)
    work, identity = folder / "learning" / task.name, f"{base}, rank {rank}, {linears}, {layers}, {arm}"
    trainer = Trainer(model, method, collator, settings=settings, folder=work, progress=progress, identity=identity)
    (learnt,) = list(trainer.learn(Stream(tasks=(task,))))
    after, last = score(model, collator, task, settings.seed, method.arms()[0], team=team)
    scores = {"before": before, "after": after, "test_samples": len(task.test), "metric": task.scoring}
    about = {"samples": len(task.train), "steps": settings.steps, **scores, "cost": learnt.cost.row(), "seed": settings.seed}
    if not team.is_main:
        return about
    pool = pool or Pool.create(folder, mixtures, base=base, linears=linears, layers=layers, arm=arm, **prints)
    for name, found in ((BEFORE, first), (AFTER, last)):  # before `add`: an expert counts once the manifest names it
        write_jsonl(folder / "experts" / task.name / name, [prediction.as_row() for prediction in found])
    pool.add(mixtures, task.name, about=about)
    shutil.rmtree(work / "checkpoint", ignore_errors=True)  # the pool holds it now; losses.jsonl stays
    return about


def _check_new(name: str, pool: Pool | None, folder: Path, *, linears: object, layers: object, router: str | None) -> None:
    """Refuses at the door what would otherwise come to light after minutes of training."""
    check_name(name)
    if router is not None and router not in ROUTINGS:
        raise UserError(f"Unknown router '{router}'. {nearest(router, ROUTINGS)}")
    if pool is None:
        return
    if name in pool.names:
        raise UserError(f"The pool {folder} knows a task '{name}' already. Choose another name for the new one.")
    kept = {"linears": pool.manifest["linears"], "layers": pool.manifest["layers"], "router": pool.arm}
    for what, given in {"linears": linears, "layers": layers, "router": router}.items():
        if given is not None and given != kept[what]:
            raise UserError(f"{what} is {given!r}, but the pool {folder} was made with {kept[what]!r}. Leave it out, or start a new pool.")


def absolute(model_name: str) -> str:
    """A folder by its whole path, so that the pool works from every working directory; other names as they are."""
    return str(Path(model_name).resolve()) if Path(model_name).is_dir() else model_name


def score(model: Any, collator: Collator, task: Task, seed: int, arm: Arm | None, *, team: Team | None = None) -> tuple[float | None, list]:
    """The model's score on a task's test split, and the predictions behind it; None and none without test samples."""
    if not task.test:
        return None, []
    arm = arm or Arm(name="default", enter=_as_it_is)
    with arm.enter(task):
        found = evaluate_task(model, collator, task, batch_size=16, seed=seed, around=arm.around, team=team)
    found = with_prompt_hashes(found, task, collator.processor)
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
    if mixtures is None or not mixtures.names:
        return Reply(text=text, shares={BASE: 1.0}, tokens=[], seconds=seconds)
    task = Task(name="question", train=[], test=[])
    arm = Arm(name="pool", enter=_as_it_is, around=mixtures.director.on_prompts)
    weights = log_weights(mixtures, model, prompt, arm, task).tokens()[0]
    names = [*mixtures.names, BASE]
    shares = dict(zip(names, weights.mean(dim=0).tolist(), strict=True))
    image = mixtures.anatomy.image_mask(prompt["input_ids"])[0].tolist()
    ids = prompt["input_ids"][0].tolist()
    said = ["[image]" if is_image else collator.tokenizer.decode([token]) for token, is_image in zip(ids, image, strict=True)]
    speakers = [names[int(index)] for index in weights.argmax(dim=-1)]
    return Reply(text=text, shares=shares, tokens=list(zip(said, speakers, strict=True)), seconds=seconds)


def score_pool(
    opened: Opened,
    tasks: list[Task],
    *,
    out: Path,
    limit: int | None = None,
    progress: Progress | None = None,
    finish: Callable[[Task, list[Prediction]], list[Prediction]] | None = None,
) -> list[dict[str, Any]]:
    """Scores the pool (or the model) on tasks and keeps every prediction in `out`; `finish` may score them anew."""
    collator, rows = Collator(opened.processor), []
    for task in tasks:
        found = evaluate_task(
            opened.model,
            collator,
            task,
            batch_size=16,
            limit=limit,
            around=opened.mixtures.director.on_prompts if opened.mixtures else None,
            progress=_follow(progress, task, limit=limit),
        )
        found = with_prompt_hashes(found, task, collator.processor)
        found = finish(task, found) if finish else found
        write_jsonl(out / f"{task.name}.jsonl", [prediction.as_row() for prediction in found])
        rows.append({"task": task.name, **vars(score_task(task, found))})
    return rows


def _follow(progress: Progress | None, task: Task, *, limit: int | None) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    bar = progress.add_task(f"scoring {task.name}", total=len(task.test[:limit]))
    return lambda done, total: progress.update(bar, completed=done)
