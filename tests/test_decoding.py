"""Answers by one token at a time: what a layer looked up for them is what the general path computes, and never another answer's."""

import copy
import pickle

import pytest
import torch
from torch import nn

from alula.context import Cell, Decoding, Routing
from alula.experts.reference import reference
from alula.mixture import Mixture, observe
from alula.mixture.decoding import GatePlan, Plan, TellPlan, plan
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


@torch.no_grad()
def kept(model, batch):
    """The cache of a prompt."""
    return model(**batch, use_cache=True).past_key_values


def watched(mixtures, model, batch):
    """The same by the general path, which shows each token."""
    with mixtures.director.recording(observer=lambda *seen: None):
        return decoded(model, batch)


def plans(mixtures):
    """Of the latest answers."""
    (decoding,) = list(mixtures.director._answers.values())[-1:]
    assert decoding.plans.keys() <= set(mixtures.sites.values())
    return {type(one) for one in decoding.plans.values()}


def follow(model, cache, mask, *, token=5):
    """Logits of one more token, on a copy of the cache."""
    mask = torch.cat([mask, mask[:, :1]], dim=1)
    with torch.no_grad():
        return model(input_ids=torch.tensor([[token]]), attention_mask=mask, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "mllama"])
@pytest.mark.parametrize(("routing", "kind"), [(TOLD, TellPlan), (GATED, GatePlan)])
def test_plans_say_what_the_general_path_says(family, routing, kind):
    model, processor, mixtures = taught(family, experts=("one", "two", "three"))
    for mixture in mixtures.sites.values():
        mixture.routers["gate"].gates[0].data.zero_()  # never trained: takes no part
    mixtures.freeze()
    mixtures.routing = routing
    batch = one_row(family, processor)
    cache = kept(model, batch)
    follow(model, cache, batch["attention_mask"])
    assert kind in plans(mixtures)
    found = decoded(model, batch)
    torch.testing.assert_close(found, watched(mixtures, model, batch), rtol=1e-5, atol=1e-6)
    with mixtures.using(Routing(fixed={})):
        assert not torch.allclose(found, decoded(model, batch))


def test_linears_of_one_input_ask_the_gates_once():
    model, processor, mixtures = taught("qwen3_vl")
    mixtures.freeze()
    mixtures.routing = GATED
    batch = one_row("qwen3_vl", processor)
    cache = kept(model, batch)
    follow(model, cache, batch["attention_mask"])
    found = mixtures.director._answers[cache].plans
    for mixture in mixtures.sites.values():
        assert all(found[sibling].teller is found[mixture].teller for sibling in mixture.together)


@pytest.mark.parametrize("seed", range(4))
def test_one_expert_for_one_token_is_the_loop_of_its_definition(seed):
    generator = torch.Generator().manual_seed(seed)
    ranks, width, wide = (1, 3, 7), 6 + seed, 9 - seed
    mixture = Mixture(nn.Linear(width, wide, bias=seed % 2 == 0), path="layer", block="layer", cell=Cell())
    for number, rank in enumerate(ranks):
        mixture.experts.grow(f"expert{number}", rank=rank, alpha=1.0 + seed, dtype=torch.float32, generator=generator)
        mixture.experts.B[number].data.normal_(generator=generator)
    x, experts = torch.randn(1, 1, width, generator=generator), mixture.experts
    with torch.no_grad():
        for number in range(len(ranks)):
            found = plan(mixture, Decoding(Routing(fixed={}), (((number, 0.3),),)))
            assert isinstance(found, TellPlan)
            parts = {"down": [experts.A[number]], "up": [experts.B[number]], "scales": [experts.scales[number]]}
            expected = mixture.host(x) + reference(x, torch.full((1, 1, 1), 0.3), **parts)
            torch.testing.assert_close(found.say(x, mixture.cell), expected, rtol=1e-5, atol=1e-5)


CHANGES = {
    "grow": lambda mixtures: speak(mixtures, "three"),
    "remove": lambda mixtures: mixtures.remove("one"),
    "restore": lambda mixtures: mixtures.restore_router("two", {k: -v for k, v in mixtures.router_tensors("two").items() if "gate" in k}),
    "values": lambda mixtures: [mixture.experts.B[1].data.neg_() for mixture in mixtures.sites.values()],
    "scales": lambda mixtures: [mixture.experts.scales.__setitem__(1, 5.0) for mixture in mixtures.sites.values()],
}


def speak(mixtures, name):
    mixtures.grow(name, rank=2)
    for mixture in mixtures.sites.values():
        mixture.experts.B[-1].data.normal_()
        mixture.routers["gate"].gates[-1].data.normal_()
    mixtures.freeze()


@pytest.mark.parametrize("routing", [TOLD, GATED])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_the_middle_of_an_answer_is_heard_from_the_next_token_on(change, routing):
    model, processor, mixtures = taught("llava")
    mixtures.freeze()
    mixtures.routing = routing
    batch = one_row("llava", processor)
    cache, other = kept(model, batch), kept(model, batch)
    for one in (cache, other):
        follow(model, one, batch["attention_mask"])
    mask = torch.cat([batch["attention_mask"], batch["attention_mask"][:, :1]], dim=1)
    CHANGES[change](mixtures)
    found = follow(model, cache, mask)
    with mixtures.director.recording(observer=lambda *seen: None):
        torch.testing.assert_close(found, follow(model, other, mask), rtol=1e-5, atol=1e-6)


def test_interleaved_answers_keep_their_plans():
    model, processor, mixtures = taught("llava")
    mixtures.freeze()
    mixtures.routing = GATED
    batch = one_row("llava", processor)
    caches, mask = [kept(model, batch), kept(model, batch)], batch["attention_mask"]
    made = []
    for _ in range(3):
        for cache in caches:
            follow(model, cache, mask)
            made.append(dict(mixtures.director._answers[cache].plans))
        mask = torch.cat([mask, mask[:, :1]], dim=1)
    for first, later in zip(made[:2], made[-2:], strict=True):
        assert first and all(later[mixture] is one for mixture, one in first.items())


def test_a_recorder_hears_of_a_decision_on_the_prompt_once_and_of_the_gates_for_each_token():
    model, processor, mixtures = taught("llava")
    mixtures.freeze()
    batch = one_row("llava", processor)
    for routing, wanted in ((TOLD, 1), (GATED, 5)):
        mixtures.routing, seen = routing, []
        with mixtures.director.recording(recorder=lambda path, *rest, seen=seen: seen.append(path)):
            decoded(model, batch)
        assert len(seen) == wanted * len(mixtures.sites)


@pytest.mark.parametrize("arm", ["fixed", "gate", "arrow", "analytic", "groups"])
def test_inference_mode_gives_what_no_grad_gives(arm):
    model, processor, mixtures = taught("llava")
    mixtures.freeze()
    batch = one_row("llava", processor)
    for name in mixtures.names:
        observe(mixtures, name, batch)
    mixtures.routing = {
        "fixed": TOLD,
        "groups": Routing(router="gate", level="token", top_k=1, groups=1),
        "analytic": Routing(router="analytic", level="sample"),
    }.get(arm) or Routing(router=arm, level="token", top_k=2)
    expected = decoded(model, batch)
    with torch.inference_mode():
        found = decoded(model, batch)
    assert torch.equal(found.clone(), expected)
    assert torch.equal(decoded(model, batch), expected)


def test_an_emptied_cache_is_decided_upon_anew():
    model, processor, mixtures = taught("llava")
    mixtures.freeze()
    batch = one_row("llava", processor)
    other = {**batch, "input_ids": batch["input_ids"].flip(1)}
    mixtures.routing = Routing(router="analytic", level="sample")
    observe(mixtures, "one", batch)
    observe(mixtures, "two", other)
    with torch.no_grad():
        cache = kept(model, batch)
        cache.reset()
        again = model(**other, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(again, model(**other, use_cache=True).logits)
        assert mixtures.director.decide(batch).argmax() != mixtures.director.decide(other).argmax()


def test_what_a_hook_on_a_host_keeps_stays_as_the_host_said_it():
    model, processor, mixtures = taught("llava")
    mixtures.freeze()
    mixtures.routing = TOLD
    batch, kept_outputs = one_row("llava", processor), []
    host = next(iter(mixtures.sites.values())).host
    host.register_forward_hook(lambda module, args, out: kept_outputs.append((args[0], out)))
    decoded(model, batch)
    for x, out in kept_outputs:
        assert torch.equal(out, nn.functional.linear(x, host.weight, host.bias))


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


def test_a_copy_answers_with_its_own_tensors():
    model, processor, mixtures = taught("llava")
    mixtures.freeze()
    mixtures.routing = TOLD
    batch = one_row("llava", processor)
    before = decoded(model, batch)
    twin = copy.deepcopy(model)
    for mixture in mixtures.sites.values():
        mixture.experts.B[1].data.zero_()
    assert torch.equal(decoded(twin, batch), before) and not torch.equal(decoded(model, batch), before)


@pytest.mark.parametrize("routing", [TOLD, GATED])
def test_a_pickled_model_answers_as_before(routing):
    model, processor, mixtures = taught("llava")
    mixtures.freeze()
    mixtures.routing = routing
    batch = one_row("llava", processor)
    before = decoded(model, batch)
    assert torch.equal(decoded(pickle.loads(pickle.dumps(model)), batch), before)


def test_experts_of_another_type_than_their_host_take_the_general_path():
    model, processor = build("llava")
    mixtures = speaking(model.to(torch.bfloat16), "one", "two")
    mixtures.freeze()
    mixtures.routing = TOLD
    cache = kept(model, one_row("llava", processor))
    follow(model, cache, one_row("llava", processor)["attention_mask"])
    assert plans(mixtures) == {Plan}
