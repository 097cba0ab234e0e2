"""What the methods promise: experts do not know each other, what is frozen stays, joint sees everything."""

import itertools

import pytest
import torch

from alula import Collator, Stream, Trainer, TrainSettings, load_task
from alula.files import read_jsonl
from alula.methods import METHODS
from zoo import build

SETTINGS = TrainSettings(steps=2, batch_size=4, learning_rate=1e-2)
OPTIONS = {
    "routed": {"arms": ("analytic", "gate", "oracle"), "gate_steps": 2, "rank": 2, "statistics_samples": 8},
    "specialist": {"rank": 2},
}


def stream(*names):
    return Stream(tasks=tuple(load_task(name, train_size=8, test_size=2) for name in names))


def learn(name, tasks, *, folder=None, seen=None):
    model, processor = build("llava")
    method = METHODS[name](model, settings=SETTINGS, **OPTIONS.get(name, {}))
    trainer = Trainer(model, method, Collator(processor), settings=SETTINGS, folder=folder)
    for learnt in trainer.learn(tasks):
        if seen is not None:
            seen(learnt, model, method)
    return model, method


def expert(method, name):
    index = method.mixtures.index(name)
    found = {}
    for path, mixture in method.mixtures.sites.items():
        found |= {f"{path}.A": mixture.experts.A[index].clone(), f"{path}.B": mixture.experts.B[index].clone()}
        found[f"{path}.gate"] = mixture.routers["gate"].gates[index].clone()
    return found


def test_a_new_task_leaves_every_tensor_of_earlier_experts_bit_identical():
    kept = []
    learn("routed", stream("digits", "easy_vqa"), seen=lambda learnt, model, method: kept.append(expert(method, "digits")))
    assert len(kept) == 2 and kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
    assert any(tensor.any() for name, tensor in kept[0].items() if name.endswith(".B"))


def test_experts_are_bit_identical_in_any_order_of_tasks():
    _, forward = learn("routed", stream("digits", "easy_vqa"))
    _, backward = learn("routed", stream("easy_vqa", "digits"))
    for name in ("digits", "easy_vqa"):
        one, two = expert(forward, name), expert(backward, name)
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_prompt_router_is_the_same_in_any_order_of_tasks():
    _, forward = learn("routed", stream("digits", "easy_vqa"))
    _, backward = learn("routed", stream("easy_vqa", "digits"))
    for one, two in zip(forward.mixtures.prompt_router.statistics, backward.mixtures.prompt_router.statistics, strict=True):
        assert one.names == two.names == ["base", "digits", "easy_vqa"]
        # general text is read in the order of the first task's seed; its sums differ in the last bit of fp64
        torch.testing.assert_close(one.solve(), two.solve(), rtol=1e-5, atol=1e-6)


def test_specialists_are_the_experts_of_routed():
    _, routed = learn("routed", stream("digits"))
    _, specialist = learn("specialist", stream("digits"))
    one, two = expert(routed, "digits"), expert(specialist, "digits")
    assert all(torch.equal(one[name], two[name]) for name in one if not name.endswith(".gate"))


@pytest.mark.parametrize("name", ["routed", "finetune", "joint", "specialist"])
def test_the_base_model_is_bit_identical_after_learning(name):
    untouched, _ = build("llava")
    before = untouched.state_dict()
    model, method = learn(name, stream("digits", "easy_vqa"))
    method.mixtures.detach()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_joint_takes_as_many_steps_as_the_tasks_in_turn(tmp_path):
    learn("joint", stream("digits", "easy_vqa"), folder=tmp_path / "joint")
    learn("finetune", stream("digits", "easy_vqa"), folder=tmp_path / "finetune")
    steps = [len(read_jsonl(tmp_path / name / "losses.jsonl")) for name in ("joint", "finetune")]
    assert steps == [4, 4]


def test_cost_of_a_task_does_not_grow_with_the_number_of_tasks():
    costs = []
    learn("routed", stream("digits", "easy_vqa", "animals"), seen=lambda learnt, model, method: costs.append(learnt.cost))
    assert costs[1].samples_seen == costs[2].samples_seen
    assert costs[1].trainable_parameters == costs[2].trainable_parameters
    grown = [after.stored_bytes - before.stored_bytes for before, after in itertools.pairwise(costs)]
    assert grown[0] == grown[1] > 0
