"""A method on a tiny LLaVA, at the beginning of a task or after some, and what it changed."""

import torch

from alula import Collator, Stream, Trainer, TrainSettings
from alula.data.stream import Task
from alula.methods import METHODS
from resume_worker import pictures
from zoo import build, example_batch

SETTINGS = TrainSettings(steps=2, batch_size=4, learning_rate=1e-2)


def tasks(*names):
    return tuple(Task(name=name, train=pictures(name, 6), test=[]) for name in names)


def learn(name, *names, **options):
    """A model that learnt tasks of these names, its method, and the cost of each task."""
    model, processor = build("llava")
    method = METHODS[name](model, settings=SETTINGS, **options)
    trainer = Trainer(model, method, Collator(processor), settings=SETTINGS, folder=None)
    return model, method, [learnt.cost for learnt in trainer.learn(Stream(tasks=tasks(*names)))]


def begun(name, **options):
    """A method in the first step of its first task, and something to say."""
    model, processor = build("llava")
    method = METHODS[name](model, settings=SETTINGS, **options)
    task = tasks("one")[0]
    method.begin_task(model, task)
    method.begin_stage(model, task, method.stages(task)[0])
    return model, method, task, example_batch("llava", processor)


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def changed(model, name="llava"):
    before = build(name)[0].state_dict()
    return {key for key, value in model.state_dict().items() if key not in before or not torch.equal(before[key], value)}


@torch.no_grad()
def teach(mixtures, *, seed=1):
    """Gives every expert something to say."""
    generator = torch.Generator().manual_seed(seed)
    for mixture in mixtures.sites.values():
        for up in mixture.experts.B:
            up.normal_(std=0.3, generator=generator)
