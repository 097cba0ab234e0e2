"""Answers by one token at a time: what a layer looked up for them is what the general path computes, and never another answer's."""

import copy

import pytest
import torch
from torch import nn

from alula.context import Routing
from alula.mixture.decoding import GatePlan, Plan, TellPlan
from taught_experts import speaking, taught
from zoo import build, example_batch

TOLD = Routing(fixed={"two": 0.5})
GATED = Routing(router="gate", level="token", top_k=2)


def one_row(family, processor):
    batch = example_batch(family, processor, text_only=True)
    return {key: value[:1] for key, value in batch.items()}


@torch.no_grad()
def decoded(model, batch, *, tokens=4):
    """Logits of a prompt's last token and of `tokens` further ones, always the same, from the cache."""
    out, mask, found = model(**batch, use_cache=True), batch["attention_mask"], []
    for number in range(tokens):
        mask = torch.cat([mask, mask[:, :1]], dim=1)
        ids = torch.full((len(mask), 1), 5 + number)
        out = model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.stack(found)


def watched(mixtures, model, batch):
    """The same by the general path, which records who spoke."""
    with mixtures.director.recording(recorder=lambda *seen: None):
        return decoded(model, batch)


def plans(mixtures):
    return {type(mixture.plan) for mixture in mixtures.sites.values()}


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "mllama"])
@pytest.mark.parametrize(("routing", "kind"), [(TOLD, TellPlan), (GATED, GatePlan)])
def test_plans_say_what_the_general_path_says(family, routing, kind):
    model, processor, mixtures = taught(family, experts=("one", "two", "three"))
    for mixture in mixtures.sites.values():
        mixture.routers["gate"].gates[0].data.zero_()  # never trained: takes no part
    mixtures.freeze()
    mixtures.routing = routing
    batch = one_row(family, processor)
    found = decoded(model, batch)
    assert kind in plans(mixtures)
    torch.testing.assert_close(found, watched(mixtures, model, batch), rtol=1e-5, atol=1e-6)
    with mixtures.using(Routing(fixed={})):
        assert not torch.allclose(found, decoded(model, batch))


def test_linears_of_one_input_ask_the_gates_once():
    model, processor, mixtures = taught("qwen3_vl")
    mixtures.freeze()
    mixtures.routing = GATED
    decoded(model, one_row("qwen3_vl", processor))
    for mixture in mixtures.sites.values():
        assert all(sibling.plan.teller is mixture.plan.teller for sibling in mixture.together)


@pytest.mark.parametrize("routing", [TOLD, GATED])
def test_an_answer_after_experts_changed_is_by_the_experts_that_are_there(routing):
    model, processor, mixtures = taught("llava")
    mixtures.freeze()
    mixtures.routing = routing
    batch = one_row("llava", processor)
    before = decoded(model, batch)
    with torch.no_grad():
        for mixture in mixtures.sites.values():
            mixture.experts.B[1].neg_()
            mixture.routers["gate"].gates[1].neg_()
    changed = decoded(model, batch)
    assert not torch.allclose(changed, before)
    torch.testing.assert_close(changed, watched(mixtures, model, batch), rtol=1e-5, atol=1e-6)


def test_one_conversation_whose_expert_is_replaced_hears_the_new_one():
    model, processor, mixtures = taught("llava", experts=("one", "two", "three"))
    mixtures.freeze()
    batch = one_row("llava", processor)
    mixtures.routing = Routing(fixed={"one": 1.0})
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        mask = torch.cat([batch["attention_mask"], batch["attention_mask"][:, :1]], dim=1)
        step = {"input_ids": torch.tensor([[5]]), "attention_mask": mask, "use_cache": True}
        fork, other = copy.deepcopy(out.past_key_values), copy.deepcopy(out.past_key_values)
        model(**step, past_key_values=fork)
        fork.crop(-1)
        mixtures.remove("one")  # "two" takes its place in the list
        mixtures.routing = Routing(fixed={"two": 1.0})
        said = model(**step, past_key_values=fork).logits
        assert torch.equal(said, model(**step, past_key_values=other).logits)


@pytest.mark.parametrize("routing", [TOLD, GATED])
def test_hooks_on_a_host_are_called_for_every_token(routing):
    model, processor, mixtures = taught("llava")
    mixtures.freeze()
    mixtures.routing = routing
    batch = one_row("llava", processor)
    plain, seen = decoded(model, batch), []
    host = next(iter(mixtures.sites.values())).host
    host.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    torch.testing.assert_close(decoded(model, batch), plain, rtol=1e-5, atol=1e-6)
    assert seen[1:] == [1, 1, 1, 1]


def test_a_copy_has_no_plan_of_the_original():
    model, processor, mixtures = taught("llava")
    mixtures.freeze()
    mixtures.routing = TOLD
    batch = one_row("llava", processor)
    decoded(model, batch)
    assert all(module.plan is None for module in copy.deepcopy(model).modules() if hasattr(module, "plan"))


def test_experts_of_another_type_than_their_host_take_the_general_path():
    model, processor = build("llava")
    mixtures = speaking(model.to(torch.bfloat16), "one", "two")
    mixtures.freeze()
    mixtures.routing = TOLD
    decoded(model, one_row("llava", processor))
    assert plans(mixtures) <= {Plan, type(None)}
    assert all(isinstance(mixture.host, nn.Linear) for mixture in mixtures.sites.values())
