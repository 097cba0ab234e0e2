"""The loop over a stream, written out: read `learn`, `_learn_task`, `_train`, `_step` from top to bottom.

It calls a method's verbs and never asks which method it has; it yields after each task and knows no evaluation.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from rich.progress import Progress
from torch import Tensor, nn

from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.methods.base import Method, Stage
from alula.methods.rates import resolve_rate
from alula.training.archive import Archive, begin_stage, begin_task, recipe_of
from alula.training.checkpoint import Checkpoint, Place, load_optimizer, optimizer_tensors
from alula.training.order import Batch, Collate, Steps, reseed, seed_of
from alula.training.records import Cost, LossLog, TaskLearnt, progress_row
from alula.training.settings import TrainSettings
from alula.training.sharding import clip_gradients, is_sharded
from alula.training.start import make_accelerator, spread_model
from alula.training.step import accumulate, count_targets
from alula.training.trackers import begin_trackers, end_trackers
from alula.training.trainable import describe, recompute_activations, set_modes, sum_gradients, trainable

logger = logging.getLogger(__name__)


class Trainer:
    """Teaches a model the tasks of a stream in order, and goes on where an interrupted run was.

    Args:
        model: the model itself, not one wrapped by DistributedDataParallel.
        collator: samples -> tensors with ``labels`` (-100 where nothing is learnt).
        folder: for losses.jsonl and checkpoint/; None: nothing is written and nothing resumed.
        accelerator: None: one is made for the devices that are there.
        trackers: names that Accelerate knows (tensorboard, wandb ...).
        progress: a bar from `progress_bar`; None: no bar.
        identity: whatever else makes this run this run (base model, data); a checkpoint of another one is refused.

    Raises:
        UserError: DeepSpeed, an unknown tracker, a method or model that cannot be sharded (`settings.shard`), or a model that
            cannot recompute activations.

    Example:
        >>> from alula.data.sample import Sample
        >>> from alula.methods import METHODS
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                                      num_attention_heads=2, num_key_value_heads=2))
        >>> def collate(samples):
        ...     ids = torch.tensor([[1, len(sample.question), len(sample.answer)] for sample in samples])
        ...     return {"input_ids": ids, "labels": ids}
        >>> settings = TrainSettings(steps=2)
        >>> trainer = Trainer(model, METHODS["finetune_full"](model, settings=settings), collate, settings=settings, folder=None)
        >>> stream = Stream(tasks=(Task(name="capitals", train=[Sample.ask("Kenya?", "Nairobi")], test=[]),))
        >>> [(learnt.task.name, learnt.cost.optimizer_targets) for learnt in trainer.learn(stream)]
        [('capitals', 64)]
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        collator: Collate,
        *,
        settings: TrainSettings,
        folder: Path | None,
        accelerator: Accelerator | None = None,
        trackers: Sequence[str] = (),
        progress: Progress | None = None,
        identity: str = "",
    ) -> None:
        self.method = method
        self.collator = collator
        self.settings = settings = resolve_rate(settings, model, say=logger.info)
        self.folder = folder
        self.identity = identity
        self.accelerator = make_accelerator(accelerator, trackers=trackers, folder=folder)
        self.device = self.accelerator.device
        self._progress = progress if self.accelerator.is_main_process else None
        self.model = spread_model(model, method, accelerator=self.accelerator, settings=settings)
        self.is_sharded = is_sharded(model)
        if settings.activation_checkpointing:
            recompute_activations(model)
        self.log = LossLog(folder / "losses.jsonl" if folder is not None and self.accelerator.is_main_process else None)
        self.archive = Archive(folder, model=model, method=method, accelerator=self.accelerator, log=self.log)
        self.recipe: dict[str, Any] = {}
        self.cost, self.clock = Cost(task=""), 0.0  # of the task that is learnt
        self._tracked: dict[str, float] = {}

    def track(self, values: dict[str, float]) -> None:
        """Hands `values` (scores, say) to the trackers, at the step that was reached; before `learn`, when that begins."""
        self._tracked |= values
        if self._tracked and self.accelerator.trackers:
            self.accelerator.log(self._tracked, step=self.log.num_rows)
            self._tracked = {}

    def learn(self, stream: Stream) -> Iterator[TaskLearnt]:
        """Yields after each task, while the model is as that task left it.

        A resumed run does not train finished tasks again. If it was interrupted between two tasks, it first yields the
        last finished one (`is_resumed`), whose evaluation may be incomplete; earlier ones are not yielded.

        Raises:
            UserError: a damaged or foreign checkpoint, a task without samples or targets, a loss that is not finite.
        """
        stream = self.method.arrange(stream)
        self.recipe = recipe_of(self.settings, self.method, stream, identity=self.identity)
        found = self.archive.load(recipe=self.recipe)
        self.archive.restore(found, stream, seed=self.settings.seed)
        start = found.place if found else Place()
        begin_trackers(self.accelerator, settings=self.settings, folder=self.folder)
        self.track({})
        try:
            if found and start == Place(task=start.task):
                last = start.task - 1
                yield TaskLearnt(index=last, task=stream.tasks[last], cost=Cost(**found.cost), is_resumed=True)
                found = None
            for index, task in enumerate(stream.tasks[start.task :], start.task):
                self._learn_task(task, found, index=index)
                found = None
                yield TaskLearnt(index=index, task=task, cost=self.cost)
        finally:
            end_trackers(self.accelerator)

    def _learn_task(self, task: Task, found: Checkpoint | None, *, index: int) -> None:
        """All stages of one task; `found` is a checkpoint from the middle of this task, already restored, or None."""
        self.clock = time.perf_counter()
        self.cost = Cost(**found.cost) if found else Cost(task=task.name)
        seeds: dict[str, Any] = {"seed": self.settings.seed, "device": self.device}
        if found is None:
            begin_task(self.method, self.model, task, **seeds)
        for number, stage in enumerate(self.method.stages(task)):
            if found and number < found.place.stage:
                continue
            resumed = found if found and number == found.place.stage else None
            if resumed is None:
                begin_stage(self.method, self.model, task, stage, **seeds)
            # The caller's random state is its own: that of each step is set below.
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                if stage.gradient:
                    start = resumed.place if resumed else Place(task=index, stage=number)
                    self._train(task, stage, start, resumed.optimizer if resumed else {})
                else:
                    self._observe(task, stage)
            self.method.end_stage(self.model, task, stage)
        self.method.end_task(self.model, task)
        self.model.eval()
        stored = [*self.method.stored_tensors(self.model).values(), *self.method.state_dict().values()]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in stored)
        self.cost = replace(self.cost, stored_parameters=sum(tensor.numel() for tensor in stored), stored_bytes=num_bytes)
        self._save(Place(task=index + 1), {})

    def _train(self, task: Task, stage: Stage, start: Place, moments: dict[str, Tensor]) -> None:
        """The optimizer steps of one stage from `start` on."""
        settings, parameters = self.settings, self._trainable(task, stage)
        set_modes(self.model)
        optimizer = torch.optim.AdamW(_rate_groups(parameters, stage), betas=settings.betas, weight_decay=settings.weight_decay)
        for group in optimizer.param_groups if stage.rates else ():
            self._say("  %s of them at peak rate %g", f"{sum(parameter.numel() for parameter in group['params']):,}", group["peak"])
        if moments:
            load_optimizer(optimizer, parameters, moments)
        data = self._data(task, stage)
        loader = data.loader(range(start.step, stage.steps), num_workers=settings.num_workers)
        shown = progress_row(self._progress, f"{task.name}, {stage.name}", start=start.step, steps=stage.steps)
        with loader as batches, shown as advance:
            for step, batch in enumerate(batches, start.step):
                reseed(seed_of(settings.seed, task.name, stage.name, step, self.accelerator.process_index), device=self.device)
                factor = settings.rate_factor(step, steps=stage.steps)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * factor
                where: dict[str, str | int] = {"task": task.name, "stage": stage.name, "step": step}
                row = where | self._step(batch, parameters, optimizer, where=where) | {"learning_rate": stage.learning_rate * factor}
                self._count(steps=1, samples_seen=len(data.indices(step)), optimizer_targets=row["targets"])
                if step % settings.log_every == 0 or step + 1 == stage.steps:
                    self.log.append(row)
                    values = {key: row[key] for key in ("loss", "gradient_norm", "learning_rate")}
                    self.accelerator.log(values, step=self.log.num_rows)
                advance(row["loss"])
                if settings.save_every and (step + 1) % settings.save_every == 0 and step + 1 < stage.steps:
                    self._save(replace(start, step=step + 1), optimizer_tensors(optimizer, parameters))

    def _step(
        self,
        batch: list[Batch],
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        where: dict[str, str | int],
    ) -> dict:
        """One optimizer step; its part of a row of losses.jsonl."""
        place = "Task '{task}', stage '{stage}', step {step}".format(**where)
        total = count_targets(batch, self.accelerator)
        if total == 0:
            raise UserError(
                f"{place}: no sample of the batch has a target (label != -100). Each needs an answer that max_length does "
                "not cut off. Raise max_length or drop the longest samples."
            )
        summed = accumulate(batch, self._loss, total=total, accelerator=self.accelerator, in_step=self.is_sharded)
        sum_gradients(list(parameters.values()), self.accelerator)
        self.method.before_step(self.model)
        norm = clip_gradients(parameters.values(), self.settings.gradient_clip or math.inf)
        mean = sum(summed.values())
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise UserError(
                f"{place}: the loss is {mean}, the gradient norm {norm}; both must be finite. No step was taken and the last "
                "checkpoint is good. Halve learning_rate, raise warmup_ratio, or set mixed_precision to 'no'; then run again."
            )
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": mean, "targets": total, "gradient_norm": norm} | ({"parts": summed} if len(summed) > 1 else {})

    def _loss(self, micro_batch: Batch) -> dict[str, Tensor]:
        with self._precision():
            return self.method.loss(self.model, send_to_device(micro_batch, self.device))

    @torch.no_grad()
    def _observe(self, task: Task, stage: Stage) -> None:
        """A forward-only stage: each sample at most once, all of them on every process."""
        self._say("Task '%s', stage '%s' trains nothing: the data goes through the model once.", task.name, stage.name)
        self.model.eval()
        data = self._data(task, stage)
        steps = min(stage.steps, math.ceil(len(data.samples) / data.batch_size))
        loader = data.loader(range(steps), num_workers=self.settings.num_workers)
        with loader as batches, progress_row(self._progress, f"{task.name}, {stage.name}", start=0, steps=steps) as advance:
            for step, batch in enumerate(batches):
                reseed(seed_of(self.settings.seed, task.name, stage.name, step), device=self.device)
                for micro_batch in batch:
                    with self._precision():
                        self.method.observe(self.model, send_to_device(micro_batch, self.device))
                self._count(samples_seen=len(data.indices(step)))
                advance(None)

    def _trainable(self, task: Task, stage: Stage) -> dict[str, nn.Parameter]:
        """What trains, said aloud and noted in the cost."""
        parameters = trainable(self.model)
        if not parameters:
            raise UserError(
                f"Task '{task.name}', stage '{stage.name}': nothing trains, no parameter requires gradients. "
                f"{type(self.method).__name__}.begin_stage must set requires_grad on some, or give the stage gradient=False."
            )
        size = sum(parameter.numel() for parameter in parameters.values())
        self.cost = replace(self.cost, trainable_parameters=max(size, self.cost.trainable_parameters))
        self.method.trained.update(parameters)
        self._say("Task '%s', stage '%s' trains %s parameters in %d tensors.", task.name, stage.name, f"{size:,}", len(parameters))
        logger.debug("They are:\n%s", describe(parameters))
        return parameters

    def _data(self, task: Task, stage: Stage) -> Steps:
        samples = self.method.training_data(task)
        if len(samples) == 0:
            raise UserError(f"Task '{task.name}' has no training samples. Give it one or more, or take it out of the stream.")
        return Steps(
            samples,
            self.collator,
            batch_size=self.settings.batch_size,
            micro_batch_size=self.settings.micro_batch_size,
            seed=self.settings.seed,
            task=task.name,
            stage=stage.name,
            num_epochs=None if stage.gradient else 1,
            process_index=self.accelerator.process_index if stage.gradient else 0,
            num_processes=self.accelerator.num_processes if stage.gradient else 1,
            is_never_empty=self.is_sharded,
        )

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.mixed_precision == "bf16")

    def _count(self, **more: int) -> None:
        self.cost = replace(self.cost, **{name: getattr(self.cost, name) + number for name, number in more.items()})

    def _save(self, place: Place, moments: dict[str, Tensor]) -> None:
        now = time.perf_counter()
        self.cost = replace(self.cost, seconds=self.cost.seconds + now - self.clock)
        self.clock = now
        self.archive.save(place, recipe=self.recipe, cost=self.cost, optimizer=moments)

    def _say(self, message: str, *values: object) -> None:
        if self.accelerator.is_main_process:
            logger.info(message, *values)


def _rate_groups(parameters: dict[str, nn.Parameter], stage: Stage) -> list[dict[str, Any]]:
    """One group of the optimizer per peak rate of `stage`; shards apart from whole parameters, which no operation mixes."""
    groups: dict[tuple[float, type], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((stage.rate_of(name), type(parameter.data)), []).append(parameter)
    return [{"params": members, "lr": rate, "peak": rate} for (rate, _), members in groups.items()]
