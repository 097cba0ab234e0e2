"""What holds parameters back: elastic weight consolidation, orthogonal experts, freezing."""

from dataclasses import replace

import pytest
import torch

from alula import Collator
from alula.context import Routing
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.methods import METHODS, compose
from alula.methods.additions.o_lora import overlap
from alula.methods.base import plain_logits
from alula.models.anatomy import anatomy
from alula.objectives import next_token_loss
from alula.running.diagnosis import diagnose
from alula.training import Trainer
from resume_worker import SETTINGS, collate, pictures, samples, stream
from tiny_methods import ONE_STEP, learn, tiny
from zoo import build


def after_one_task(**options):
    """A fully fine-tuned model with its penalty, and a batch."""
    model, method = tiny("finetune_full", ("ewc", options))
    next(iter(Trainer(model, method, collate, settings=SETTINGS, folder=None).learn(stream())))
    return model, method, method.additions["ewc"]


def test_the_penalty_is_zero_at_the_anchor_and_pulls_by_weight_fisher_and_distance():
    model, method, ewc = after_one_task(weight=7.0, num_samples=3)
    batch = collate(samples("first", 2))
    model.requires_grad_(True)
    assert method.loss(model, batch)["ewc"].item() == 0.0
    moves = {name: torch.randn_like(value) for name, value in ewc.anchor.items()}
    known = dict(model.named_parameters())
    with torch.no_grad():
        for name, move in moves.items():
            known[name] += move
    pulls = torch.autograd.grad(method.loss(model, batch)["ewc"], [known[name] for name in moves])
    for (name, anchor), pull in zip(ewc.anchor.items(), pulls, strict=True):
        torch.testing.assert_close(pull, 7.0 * ewc.fisher[name] * (known[name].detach() - anchor))


def test_fisher_information_is_the_mean_squared_gradient_of_a_sample():
    model, _, ewc = after_one_task(num_samples=99)
    model.eval()
    name, parameter = next((name, value) for name, value in model.named_parameters() if name.endswith("layers.1.mlp.up_proj.weight"))
    by_hand = torch.zeros_like(parameter)
    for sample in stream().tasks[0].train:
        batch = collate([sample])
        log_likelihood = -next_token_loss(plain_logits(model, batch), batch["labels"]) * len(sample.answer)
        by_hand += torch.autograd.grad(log_likelihood, parameter)[0].square() / 11
    torch.testing.assert_close(ewc.fisher[name], by_hand)


def test_penalties_of_two_tasks_are_one_quadratic():
    model, method, ewc = after_one_task(num_samples=4)
    first = {name: (ewc.fisher[name].clone(), ewc.anchor[name].clone()) for name in ewc.fisher}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    second = stream().tasks[1]
    parameters = {name: value for name, value in model.named_parameters() if name in method.trained}
    alone = ewc.estimate(model, second, parameters)
    ewc.end_task(model, second)
    for name, parameter in parameters.items():
        place = parameter.detach() + 0.1
        (fisher, anchor), now = first[name], parameter.detach()
        pull = fisher * (place - anchor) + alone[name] * (place - now)
        torch.testing.assert_close(ewc.fisher[name] * (place - ewc.anchor[name]), pull)


def test_online_consolidation_keeps_the_last_anchor_and_decays():
    model, _, ewc = after_one_task(num_samples=2, decay=0.5)
    before = {name: value.clone() for name, value in ewc.fisher.items()}
    task = stream().tasks[0]
    ewc.end_task(model, task)
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(ewc.anchor[name], parameter)
            torch.testing.assert_close(ewc.fisher[name], 1.5 * before[name])


def test_orthogonal_experts_do_not_overlap():
    rows = torch.linalg.qr(torch.randn(16, 6)).Q.T
    assert overlap(rows[:4], rows[4:]).item() == pytest.approx(0.0, abs=1e-10)
    assert overlap(rows[:4], rows[2:6] * 3.0).item() == pytest.approx(2 * 9.0, rel=1e-5)


def test_the_penalty_of_o_lora_is_the_sum_over_sites_and_earlier_experts():
    model, method = tiny("routed", ("o_lora", {"weight": 2.0}), arms=(), rank=2)
    mixtures = method.mixtures
    for task in (stream().tasks[0], replace(stream().tasks[0], name="between"), stream().tasks[1]):
        method.begin_task(model, task)
        method.begin_stage(model, task, method.stages(task)[0])
    assert mixtures.routing == Routing(fixed={"first": 1.0, "between": 1.0, "second": 1.0})
    by_hand = sum(
        2.0 * (mixture.experts.A[i] @ mixture.experts.A[2].T).square().sum() for mixture in mixtures.sites.values() for i in (0, 1)
    )
    parts = method.loss(model, collate(samples("second", 2)))
    torch.testing.assert_close(parts["o_lora"], by_hand)


def test_o_lora_makes_experts_more_orthogonal_and_leaves_the_earlier_ones_alone():
    found, first = [], []
    for weight in (0.0, 10.0):
        model, method = tiny("routed", ("o_lora", {"weight": weight}), arms=(), rank=2)
        learn(model, method)
        sites = method.mixtures.sites.values()
        found.append(sum(overlap(site.experts.A[0], site.experts.A[1]).item() for site in sites))
        first.append([site.experts.A[0] for site in sites])
    assert found[1] < found[0]
    assert all(torch.equal(one, two) for one, two in zip(*first, strict=True))


def test_the_arm_sum_uses_every_expert_at_once():
    model, method = tiny("specialist", "o_lora", rank=2)
    learn(model, method)
    assert [arm.name for arm in method.arms()] == ["oracle", "sum"]
    with method.arms()[1].enter(stream().tasks[0]):
        assert method.mixtures.current == Routing(fixed={"first": 1.0, "second": 1.0})


def test_what_is_frozen_for_all_steps_stays_as_it_was():
    model, method = tiny("finetune", ("freezing", {"part": "model.layers.0", "share": 1.0}))
    learn(model, method)
    moved = {path: bool(mixture.experts.B[0].any()) for path, mixture in method.mixtures.sites.items()}
    assert all(trained == path.startswith("model.layers.1.") for path, trained in moved.items())


@pytest.mark.parametrize(("thaw", "starts"), [("top_down", [3, 0]), ("bottom_up", [0, 3]), ("at_once", [6, 6])])
def test_layers_thaw_one_after_another(thaw, starts):
    model, method = tiny("finetune_full", ("freezing", {"thaw": thaw, "share": 0.6}))
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    parts = method.additions["freezing"].schedule(names, anatomy(model), steps=10)
    assert list(parts.values()) == [*starts, 6]


def test_freezing_all_that_trains_is_refused():
    model, method = tiny("finetune", "freezing")
    with pytest.raises(UserError, match="leaves nothing to train"):
        learn(model, method)


def test_the_arm_sum_has_no_routing_to_diagnose(tmp_path):
    model, processor = build("llava")
    method = METHODS["routed"](model, settings=ONE_STEP, arms=("oracle",), rank=2, layers=[1], statistics_samples=2)
    method = compose(model, method, [("o_lora", {})], collator=Collator(processor))
    tasks = Stream(tasks=(Task(name="one", train=pictures("one", 2), test=pictures("one", 2)),))
    learn(model, method, tasks, collator=Collator(processor))
    assert [arm.name for arm in method.arms()] == ["oracle", "sum"]
    diagnose(method, model, Collator(processor), tasks, folder=tmp_path, num_examples=1)
    assert not list(tmp_path.iterdir())
