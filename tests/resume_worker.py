"""A tiny stream to train, to the end or killed at a step. Run by test_resume.py; imported by test_training.py.

python tests/resume_worker.py FOLDER --die-at TASK STEP
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.methods.base import Method, Stage
from alula.objectives.next_token import next_token_loss
from alula.training import Trainer, TrainSettings

SETTINGS = TrainSettings(steps=6, batch_size=4, micro_batch_size=2, learning_rate=5e-3, save_every=2, seed=3)


def tiny_model() -> LlamaForCausalLM:
    """Two layers with dropout, the same weights at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=40, attention_dropout=0.1, **sizes))


def samples(task: str, num_samples: int) -> list[Sample]:
    """Questions with answers of very different lengths."""
    return [Sample.ask(f"{task} {index}", "abcdefghij"[: 1 + (7 * index) % 10]) for index in range(num_samples)]


def pictures(name: str, num_samples: int) -> list[Sample]:
    """Questions about one-coloured pictures."""
    colours = ("red", "green", "blue")
    return [
        Sample.ask(f"{name} {index}?", colours[index % 3], images=(Image.new("RGB", (40, 40), colours[index % 3]),))
        for index in range(num_samples)
    ]


def stream() -> Stream:
    """Two tasks whose sizes no batch divides."""
    return Stream(tasks=tuple(Task(name=name, train=samples(name, 11), test=[]) for name in ("first", "second")))


def collate(batch: list[Sample]) -> dict[str, torch.Tensor]:
    """Letters as tokens, the answer's as targets."""
    ids = [[ord(letter) % 31 + 1 for letter in sample.question] + [ord(letter) % 31 + 1 for letter in sample.answer] for sample in batch]
    width = max(map(len, ids))
    rows, labels = torch.zeros(len(ids), width, dtype=torch.long), torch.full((len(ids), width), -100)
    mask = torch.zeros_like(rows)
    for row, (sample, tokens) in enumerate(zip(batch, ids, strict=True)):
        rows[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        start = len(sample.question)
        labels[row, start : len(tokens)] = rows[row, start : len(tokens)]
    return {"input_ids": rows, "attention_mask": mask, "labels": labels}


class LastLayer(Method):
    """Trains the last layer; adds a bias per task, so that the structure grows; keeps a sum of its own."""

    def __init__(self, model: nn.Module, *, settings: TrainSettings) -> None:
        super().__init__(model, settings=settings)
        self.seen = torch.zeros(())

    def begin_task(self, model: nn.Module, task: Task) -> None:
        model.model.norm.register_parameter(task.name, nn.Parameter(torch.randn(16) * 0.01))

    def stages(self, task: Task) -> tuple[Stage, ...]:
        statistics = Stage(name="statistics", steps=99, learning_rate=0.0, gradient=False)
        rate = self.settings.learning_rate
        train = Stage(name="train", steps=self.settings.steps, learning_rate=rate)
        return (train, statistics, Stage(name="tune", steps=4, learning_rate=rate))

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1." in name or name.endswith(f"norm.{task.name}"))

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        added = [value for name, value in model.model.norm.named_parameters() if name != "weight"]
        return {"next_token": next_token_loss(model.lm_head(hidden + sum(added)), batch["labels"])}

    def observe(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        self.seen += len(batch["labels"]) + model(input_ids=batch["input_ids"]).logits.mean().item()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.seen = state["seen"].clone()


class Mortal(LastLayer):
    """Kills its process, as the kernel does when memory runs out, before a given step."""

    def __init__(self, model: nn.Module, *, settings: TrainSettings, die_at: tuple[str, int] | None) -> None:
        super().__init__(model, settings=settings)
        self.die_at, self.steps, self.task = die_at, 0, ""

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        super().begin_stage(model, task, stage)
        self.task, self.steps = task.name, self.steps if task.name == self.task else 0

    def before_step(self, model: nn.Module) -> None:
        if (self.task, self.steps) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.steps += 1


Mortal.__name__ = "LastLayer"  # a resumed run must be of the same method, and it is: only death differs


def train(folder: Path | None, *, method: type[Method] = LastLayer, settings: TrainSettings = SETTINGS, **options: object) -> Trainer:
    """Learns the whole stream (or what is left of it)."""
    model = tiny_model()
    trainer = Trainer(model, method(model, settings=settings, **options), collate, settings=settings, folder=folder)
    trainer.learnt = list(trainer.learn(stream()))
    return trainer


def main() -> None:
    """The process that dies."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--die-at", nargs=2, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    train(given.folder, method=Mortal, die_at=(given.die_at[0], int(given.die_at[1])))
    sys.exit("it should have been killed")


if __name__ == "__main__":
    main()
