"""From a live run to its checkpoint and back: what is saved, and in which order a fresh model gets it. It knows no loop."""

from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from alula.data.stream import Stream, Task
from alula.methods.base import Method, Stage
from alula.training import checkpoint as checkpoints
from alula.training.checkpoint import Checkpoint, Place
from alula.training.order import seeded
from alula.training.records import Cost, LossLog
from alula.training.settings import BETAS, TrainSettings
from alula.training.sharding import whole
from alula.training.trainable import load_values

# What changes nothing in the numbers and may differ between a run and its resumption.
CONVENIENCES = {"save_every", "log_every", "num_workers", "shard"}


def recipe_of(settings: TrainSettings, method: Method, stream: Stream, *, identity: str) -> dict:
    """What makes a run this run, as JSON; without newer settings at their defaults, which older checkpoints do not name."""
    tasks = [f"{task.name} ({len(task.train)} samples)" for task in stream.tasks]
    left_out = CONVENIENCES | ({"betas"} if settings.betas == BETAS else set())
    return {**settings.model_dump(mode="json", exclude=left_out), "method": method.name, "tasks": tasks, "identity": identity}


def begin_task(method: Method, model: nn.Module, task: Task, *, seed: int, device: torch.device) -> None:
    """Calls the method's verb with random numbers that follow from seed and task."""
    with seeded(seed, task.name, device=device):
        method.begin_task(model, task)


def begin_stage(method: Method, model: nn.Module, task: Task, stage: Stage, *, seed: int, device: torch.device) -> None:
    """Calls the method's verb with random numbers that follow from seed, task and stage."""
    with seeded(seed, task.name, stage.name, device=device):
        method.begin_stage(model, task, stage)


class Archive:
    """The checkpoint of one cell.

    Args:
        folder: holds checkpoint/; None: nothing is saved, nothing found.
    """

    def __init__(self, folder: Path | None, *, model: nn.Module, method: Method, accelerator: Accelerator, log: LossLog) -> None:
        self.folder = folder / "checkpoint" if folder is not None else None
        self.model = model
        self.method = method
        self.accelerator = accelerator
        self.log = log

    def save(self, place: Place, *, recipe: dict, cost: Cost, optimizer: dict[str, Tensor]) -> None:
        """Writes everything a run needs to go on at `place`; on the main process, the others wait."""
        if self.folder is None:
            return
        model, optimizer = whole(self.method.stored_tensors(self.model)), whole(optimizer)
        if self.accelerator.is_main_process:
            found = Checkpoint(
                recipe=recipe,
                place=place,
                num_rows=self.log.num_rows,
                cost=asdict(cost),
                trained=tuple(sorted(self.method.trained)),
                model=model,
                method=self.method.state_dict(),
                optimizer=optimizer,
            )
            checkpoints.save(self.folder, found)
        self.accelerator.wait_for_everyone()

    def load(self, *, recipe: dict) -> Checkpoint | None:
        """What `save` wrote last; None on a fresh start."""
        if self.folder is None:
            return None
        found = checkpoints.load(self.folder, recipe=recipe)
        self.accelerator.wait_for_everyone()  # before the main process may write the next one
        return found

    def restore(self, found: Checkpoint | None, stream: Stream, *, seed: int) -> None:
        """Gives model, method and losses.jsonl the state of `found`; a fresh start empties losses.jsonl.

        Structure first (see `Method`), then values.

        Raises:
            UserError: the checkpoint holds what the model does not have.
        """
        self.log.rewind(found.num_rows if found else 0)
        if found is None:
            return
        place, device = found.place, self.accelerator.device
        for task in stream.tasks[: place.task]:
            with seeded(seed, task.name, device=device):
                self.method.rebuild(self.model, task)
        if place != Place(task=place.task):
            task = stream.tasks[place.task]
            begin_task(self.method, self.model, task, seed=seed, device=device)
            for stage in self.method.stages(task)[: place.stage + 1]:
                begin_stage(self.method, self.model, task, stage, seed=seed, device=device)
        self.method.trained.update(found.trained)
        load_values(self.model, found.model)
        self.method.load_state_dict({name: value.to(device) for name, value in found.method.items()})
