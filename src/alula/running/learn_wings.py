"""Daily use of a pool with learners: one more task for WINGS, saved beside the experts."""

import shutil
from pathlib import Path
from typing import Any

from rich.progress import Progress

from alula.data.collate import Collator
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.experts.lora import check_name
from alula.methods.wings import Wings
from alula.models import base_fingerprint, load_model
from alula.models.loading import EMBEDDED, values_fingerprint
from alula.pool import MANIFEST, Pool
from alula.running.alone import alone
from alula.running.learn import absolute, score
from alula.training import Trainer, TrainSettings
from alula.training.processes import Team


@alone
def learn_wings(
    model_name: str | None,
    pool_folder: Path | str,
    task: Task,
    *,
    settings: TrainSettings | None = None,
    options: dict[str, Any] | None = None,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains a pool's learners (new ones, if it has none) on one task; those of earlier tasks stay on disk.

    Args:
        model_name: the base model; None: the pool's, or the embedded default for a new pool.
        options: keywords of `Wings`, for a new pool's learners.

    Returns:
        the task's score before and after, with sample counts, as kept in the pool's manifest.

    Raises:
        UserError: another base model than the pool's, a name that is taken, options for learners that are there already.
    """
    settings, folder, options, team = settings or TrainSettings(), Path(pool_folder), dict(options or {}), Team()
    check_name(task.name)
    pool = Pool.open(folder) if (folder / MANIFEST).exists() else None
    if pool and pool.names:
        raise UserError(f"The pool {folder} holds LoRA experts; learners go into a pool of their own. Choose another folder.")
    if pool and task.name in pool.learner_names:
        raise UserError(f"The pool {folder} has learners '{task.name}' already. Choose another task name.")
    team.wait()  # until all have seen the pool as it is
    base = absolute(model_name or (pool.base if pool else EMBEDDED))
    model, processor = load_model(base, dtype=dtype)
    prints: dict[str, Any] = {"fingerprint": base_fingerprint(model), "values": values_fingerprint(model)}  # now: the backbone may train
    learners = pool.attach_learners(model) if pool else None
    method, collator = Wings(model, settings=settings, learners=learners, **options), Collator(processor)
    before, _ = score(model, collator, task, settings.seed, None, team=team)
    work, identity = folder / "learning" / task.name, f"{base}, {options}"
    trainer = Trainer(model, method, collator, settings=settings, folder=work, progress=progress, identity=identity)
    (learnt,) = list(trainer.learn(Stream(tasks=(task,))))
    after, _ = score(model, collator, task, settings.seed, None, team=team)
    scores = {"before": before, "after": after, "test_samples": len(task.test), "metric": task.scoring}
    about = {"samples": len(task.train), "steps": settings.steps, **scores, "cost": learnt.cost.row(), "seed": settings.seed}
    if not team.is_main:
        return about
    pool = pool or Pool.create(folder, method.learners, base=base, **prints)
    pool.add_learners(method.learners, task.name, trained=method.trained_with(model), about=about)
    shutil.rmtree(work / "checkpoint", ignore_errors=True)
    return about
