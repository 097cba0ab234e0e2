"""Handles on one model: LoRA experts and learners together, copies that are independent, threads that do not meet."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from alula.context import Routing
from alula.errors import UserError
from alula.files import read_json
from alula.learners import attach_learners
from alula.mixture import attach
from alula.pool import Pool
from taught_learners import built, logits, row, teach, together
from zoo import build, example_batch

GREEDY = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [4]}
ORDERS = pytest.mark.parametrize("experts_first", [True, False], ids=["experts first", "learners first"])
MIXED = together(row(3, "I", 4, seed=1), row(6, seed=2), left=True)


def speaking_experts(model, *names):
    """Experts that say something, each something else; the first speaks."""
    names = names or ("one",)
    mixtures = attach(model)
    generator = torch.Generator().manual_seed(2)
    for name in names:
        mixtures.grow(name, rank=2, generator=generator)
        for mixture in mixtures.sites.values():
            mixture.experts.B[-1].data.normal_(std=0.1, generator=generator)
            mixture.routers["gate"].gates[-1].data.normal_(generator=generator)
    mixtures.refresh()
    mixtures.routing = Routing(fixed={names[0]: 1.0})
    return mixtures


def both(model, *, experts_first):
    """Experts and learners that speak, and their handles in order of arrival."""
    mixtures = speaking_experts(model) if experts_first else None
    learners = teach(attach_learners(model, rank=4, positions=64))
    mixtures = mixtures or speaking_experts(model)
    return mixtures, learners, (mixtures, learners) if experts_first else (learners, mixtures)


def test_experts_and_learners_speak_together_in_either_order():
    model, _ = built("llava")
    base, found = logits(model, MIXED), []
    for experts_first in (True, False):
        *_, arrived = both(model, experts_first=experts_first)
        found.append(logits(model, MIXED))
        assert torch.equal(model.generate(**MIXED, **GREEDY), model.generate(**MIXED, **GREEDY, use_cache=False))
        for handle in reversed(arrived):
            handle.detach()
        assert torch.equal(logits(model, MIXED), base)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@ORDERS
def test_attaching_freezes_the_base_and_no_other_handles_parameters(experts_first):
    model, _ = build("llava")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = logits(model.requires_grad_(False), MIXED)
    mixtures, learners, arrived = both(model.requires_grad_(True), experts_first=experts_first)
    mixtures.train_expert("one")
    own = {id(parameter) for parameter in learners.parameters().values()}
    own |= {id(matrix) for mixture in mixtures.sites.values() for matrix in (mixture.experts.A[0], mixture.experts.B[0])}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == own
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    was = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(**MIXED).logits.square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    for part in (".experts.A.", ".experts.B.", ".learners.image.", ".learners.text.", ".router.gate."):
        assert any(part in name and not torch.equal(after[name], was[name]) for name in after), part
    mixtures.freeze()
    assert all(parameter.requires_grad for parameter in learners.parameters().values())
    learners.train(router=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for handle in reversed(arrived):
        handle.detach()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(logits(model, MIXED), base)


def test_one_pool_keeps_experts_and_learners_under_the_same_names_in_either_order(tmp_path):
    expected, files = [], []
    for experts_first in (True, False):
        model, _ = build("llava")
        folder = tmp_path / str(experts_first)
        mixtures, learners, _ = both(model, experts_first=experts_first)
        pool = Pool.create(folder, mixtures, base="tiny")
        pool.add(mixtures, "one", about={})
        pool.add_learners(learners, "one", about={})
        expected.append(logits(model.requires_grad_(False), MIXED))
        entries = Pool.open(folder).manifest
        files.append((entries["experts"][0]["files"], entries["learners"][0]["files"]))
        assert not any("host" in path for path in read_json(folder / "experts" / "one" / "adapter_config.json")["target_modules"])
    assert files[0] == files[1], "the same bytes"
    for experts_first in (True, False):
        model, pool = build("llava")[0], Pool.open(tmp_path / "True")
        mixtures = pool.attach(model) if experts_first else None
        pool.attach_learners(model)
        mixtures = mixtures or pool.attach(model)
        mixtures.routing = Routing(fixed={"one": 1.0})
        assert torch.equal(logits(model.requires_grad_(False), MIXED), expected[0 if experts_first else 1])


@pytest.mark.parametrize("first", ["experts", "learners"])
def test_what_was_attached_first_cannot_be_detached_first(first):
    model, _ = built("llava")
    mixtures, _, arrived = both(model, experts_first=first == "experts")
    expected = logits(model, MIXED)
    with pytest.raises(UserError, match="Detach what was attached last"):
        arrived[0].detach()
    if first == "experts":
        with pytest.raises(UserError, match="Detach what was attached last"):
            mixtures.merge({"one": 1.0})
    assert torch.equal(logits(model, MIXED), expected)
    for handle in reversed(arrived):
        handle.detach()


def attached(kind):
    """A model of its own with handles that speak, by kind."""
    model, _ = build("llava")
    mixtures = speaking_experts(model, "one", "two") if "experts" in kind else None
    learners = teach(attach_learners(model, rank=4, positions=64)) if "learners" in kind else None
    if mixtures:
        mixtures.routing = Routing(router="gate", level="token", top_k=2)
    return model, mixtures, learners


@pytest.mark.parametrize("kind", ["experts", "learners", "experts and learners"])
def test_a_copy_gives_equal_logits_and_is_independent(kind):
    original = attached(kind)
    model, expected = original[0], logits(original[0], MIXED)
    written = model.generate(**MIXED, **GREEDY)
    twin, *handles = copy.deepcopy(original)
    assert torch.equal(logits(twin, MIXED), expected) and torch.equal(twin.generate(**MIXED, **GREEDY), written)
    assert torch.equal(logits(copy.deepcopy(model), MIXED), expected), "of the model alone"
    assert {*map(id, twin.parameters())}.isdisjoint(map(id, model.parameters()))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if any(part in name for part in (".experts.", ".learners.")):
                parameter.add_(0.1)
    assert not torch.allclose(logits(twin, MIXED), expected) and torch.equal(logits(model, MIXED), expected)
    for handle in reversed([handle for handle in handles if handle]):
        assert handle.model is twin
        handle.detach()
    assert torch.equal(logits(model, MIXED), expected), "the copy's detach leaves the original"
    assert torch.equal(logits(twin, MIXED), logits(build("llava")[0].requires_grad_(False), MIXED))
    twin = copy.deepcopy(original)[0]
    for handle in reversed([handle for handle in original[1:] if handle]):
        handle.detach()
    assert torch.equal(logits(twin, MIXED), expected), "and the other way round"


def test_a_block_on_the_original_does_not_reach_its_copy():
    model, mixtures, learners = attached("experts and learners")
    expected = logits(model, MIXED)
    with mixtures.using(Routing(fixed={})), learners.using():
        twin, silent, _ = copy.deepcopy((model, mixtures, learners))
        base = logits(model, MIXED)
        assert torch.equal(logits(twin, MIXED), expected) and not torch.equal(base, expected)
    with silent.using(Routing(fixed={})):
        assert torch.equal(logits(model, MIXED), expected)


def test_a_copy_puts_back_its_own_connector():
    model, _, learners = attached("learners")
    weight = "model.multi_modal_projector.linear_1.weight"
    before = model.get_parameter(weight).detach().clone()
    learners.exchange({weight: before - 1.0}, origin="here")
    learners.exchange({weight: before + 1.0}, origin="there")
    twin, own = copy.deepcopy((model, learners))
    own.detach()
    assert torch.equal(twin.get_parameter(weight), before) and torch.equal(model.get_parameter(weight), before + 1.0)


def in_two_threads(model, path, *calls):
    """What each of two calls gives while both are in the same place of one layer at once."""
    meeting = threading.Barrier(2, timeout=60)

    def meet(module, args):
        meeting.wait()

    hook = model.get_submodule(path).register_forward_pre_hook(meet)
    try:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(torch.no_grad()(lambda call: call()), calls))
    finally:
        hook.remove()


def test_two_threads_share_a_model_each_with_its_own_experts():
    model, mixtures, _ = attached("experts")

    def ask(routing):
        with mixtures.using(routing):
            return model(**MIXED, use_cache=False).logits

    calls = [lambda routing=routing: ask(routing) for routing in (Routing(fixed={"two": 1.0}), Routing(router="arrow", level="token"))]
    with torch.no_grad():
        alone = [call() for call in calls]
    path = f"{mixtures.anatomy.attention[1]}.q_proj"  # behind the tap of that layer
    found = in_two_threads(model, path, *calls)
    assert all(torch.equal(one, two) for one, two in zip(found, alone, strict=True))
    assert not torch.allclose(*alone)


def test_two_threads_share_learners_that_join_behind_a_norm():
    model, processor = build("gemma3")
    learners = teach(attach_learners(model.requires_grad_(False), rank=4, positions=64))
    batches = [example_batch("gemma3", processor), example_batch("gemma3", processor, image_seed=1)]
    calls = [lambda batch=batch: model(**batch, use_cache=False).logits for batch in batches]
    with torch.no_grad():
        alone = [call() for call in calls]
    path = f"{learners.anatomy.layers[1]}.post_attention_layernorm"
    found = in_two_threads(model, path, *calls)
    assert all(torch.equal(one, two) for one, two in zip(found, alone, strict=True))
    assert not torch.allclose(*alone)
