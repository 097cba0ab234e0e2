"""One of several processes of test_distributed.py: a cut sharded training, a sharded recipe, a data-parallel one by the command line.

torchrun --nproc-per-node 2 tests/distributed_worker.py FOLDER
"""

import contextlib
import shutil
import sys
from pathlib import Path

import torch
import yaml
from PIL import Image

from alula.cli import main as command_line
from alula.config import read_recipe
from alula.data.collate import Collator
from alula.data.readers import read_task
from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.files import write_json, write_jsonl, write_text
from alula.methods import METHODS
from alula.running.learn import learn_task
from alula.running.run import run_recipe
from alula.training import Trainer, TrainSettings
from alula.training.processes import join_launch
from few_prompts import few_general_prompts
from zoo import build

COLOURS = ("red", "green", "blue")
# Five samples for two processes in micro-batches of two, half of them without an image: shares, shapes and encoders differ.
TRAIN = {"steps": 3, "batch_size": 5, "micro_batch_size": 2, "learning_rate": 5e-3, "save_every": 2}
FULL = {"learning_rate": 5e-4, "activation_checkpointing": True}
METHOD_CHOICES = [
    {"name": "routed", "options": {"arms": ["analytic", "gate"], "gate_steps": 2, "rank": 2, "layers": [1, 2]}},
    {"name": "finetune", "options": {"rank": 2, "layers": [1, 2]}, "with": ["soft_targets", "distillation", "rehearsal", "ewc"]},
    {"name": "finetune_full", "options": {"connector": True}, "train": FULL},
]


class Cut(Exception):
    """The training ends here, on all processes."""


def cut_short(kind, steps):
    """The method, which ends before the step of that number, counted from 1."""

    class Short(kind):
        num_steps = 0

        def before_step(self, model):
            self.num_steps += 1
            if self.num_steps == steps:
                raise Cut

    Short.__name__ = kind.__name__
    return Short


def write_world(folder):
    """A tiny model, two tasks of which half the rows have no image, and a recipe."""
    model, processor = build("llava")
    model.generation_config.suppress_tokens = [processor.tokenizer.convert_tokens_to_ids("<image>")]  # a random model would say it
    model.generation_config.eos_token_id = list(range(2, 512, 5))  # and would never end
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for colour in COLOURS:
        Image.new("RGB", (40, 40), colour).save(folder / f"{colour}.png")
    tasks = []
    for name in ("colours", "words"):
        rows = [mixed_row(name, index) for index in range(12)]
        write_jsonl(folder / f"{name}-train.jsonl", rows[:9])
        write_jsonl(folder / f"{name}-test.jsonl", rows[9:])
        tasks.append({"name": name, "path": str(folder / f"{name}-train.jsonl"), "test_path": str(folder / f"{name}-test.jsonl")})
    raw = {"model": str(folder / "model"), "tasks": tasks, "methods": METHOD_CHOICES, "train": TRAIN, "examples": 1}
    raw["evaluation"] = {"batch_size": 2, "future_tasks": False}
    write_text(folder / "recipe.yaml", yaml.safe_dump(raw))
    write_text(folder / "sharded.yaml", yaml.safe_dump({**raw, "methods": [{"name": "lora"}, *METHOD_CHOICES]}))


def mixed_row(name, index):
    colour = COLOURS[index % 3]
    row = {"question": f"{name} {index}: which colour?", "answer": colour if index % 4 else f"{colour} it is"}
    return row if index % 2 else {**row, "image": f"{colour}.png"}


def full_training(folder, *, kind=METHODS["finetune_full"], shard=False):
    """Trains the whole decoder on two pictures at a time."""
    model, processor = build("llava")
    settings = TrainSettings(steps=4, batch_size=2, save_every=2, learning_rate=1e-3, shard=shard)
    data = [Sample.ask(f"{index}?", colour, images=(Image.new("RGB", (40, 40), colour),)) for index, colour in enumerate(COLOURS)]
    trainer = Trainer(model, kind(model, settings=settings), Collator(processor), settings=settings, folder=folder)
    for _ in trainer.learn(Stream(tasks=(Task(name="colours", train=data, test=[]),))):
        pass
    return trainer


def learn(folder, pool, *, shard=False):
    """One task for a new pool."""
    task = read_task("colours", folder / "colours-train.jsonl", test_path=folder / "colours-test.jsonl")
    settings = TrainSettings(steps=3, batch_size=3, learning_rate=1e-2, shard=shard)
    return learn_task(str(folder / "model"), pool, task, settings=settings, rank=2, layers=[1, 2])


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    join_launch()
    with few_general_prompts():
        everything(folder)


def everything(folder):
    """What both processes do."""
    with contextlib.suppress(Cut):
        full_training(folder / "cut", kind=cut_short(METHODS["finetune_full"], 4), shard=True)
    is_main = torch.distributed.get_rank() == 0
    if is_main:
        shutil.copytree(folder / "cut", folder / "again")
    torch.distributed.barrier()
    full_training(folder / "again", shard=True)
    learn(folder, folder / "pool", shard=True)
    crashed = run_recipe(read_recipe(folder / "sharded.yaml", changes=["train.shard=true"]), folder / "sharded", say=lambda line: None)
    if is_main:
        write_json(folder / "crashed.json", crashed)
    sys.argv = ["alula", "run", str(folder / "recipe.yaml"), "--out", str(folder / "spread")]
    command_line()


if __name__ == "__main__":
    main()
