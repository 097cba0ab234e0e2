"""Evaluation takes the model that is in memory, in the middle of training too: no weight is copied, and nothing of the training changes."""

import copy
from dataclasses import replace

import pytest
import torch

from alula import Collator, Task
from alula.context import Routing
from alula.evaluation.evaluate import evaluate_task
from live_weights import watched
from resume_worker import pictures
from taught_experts import speaking
from zoo import build

COLOURS = ("red", "green", "blue")


@pytest.fixture
def training():
    """A model with an expert in the middle of a step: gradients are there, the optimizer has moments."""
    model, processor = build("llava")
    mixtures, collator = speaking(model, "one"), Collator(processor)
    mixtures.routing = Routing(fixed={"one": 1.0})
    mixtures.train_expert("one")
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3)
    for _ in range(2):
        model(**collator(pictures("a", 2))).loss.backward()
        optimizer.step()
    return model, collator, optimizer


def task(scoring):
    samples = [replace(sample, options=COLOURS) for sample in pictures("a", 3)]
    return Task(name="a", train=[], test=samples, scoring=scoring, max_new_tokens=2)


@pytest.mark.parametrize("scoring", ["exact_match", "ranked"])
def test_evaluate_task_runs_on_the_very_model_and_copies_no_weight(training, scoring):
    model, collator, _ = training
    with watched(model) as weights:
        evaluate_task(model, collator, task(scoring), batch_size=2)
    assert weights.forwards and weights.stayed


def test_a_copy_would_be_seen(training):
    model, collator, _ = training
    with watched(model) as weights:
        evaluate_task(copy.deepcopy(model), collator, task("exact_match"), batch_size=2)
    assert weights.forwards and not weights.stayed


def test_evaluation_between_two_steps_leaves_training_as_it_was(training):
    model, collator, optimizer = training
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    state, random = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    evaluate_task(model, collator, task("exact_match"), batch_size=2)
    assert model.training and torch.equal(torch.get_rng_state(), random)
    after = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients and gradients.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in gradients.items())
    for index, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][index][key]) for key, value in moments.items())
