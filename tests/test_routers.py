"""Token-level routers against their equations: the null options do what they say, products are shared, nothing wide is kept."""

import math

import pytest
import torch

from alula.context import Context, Routing
from alula.errors import UserError
from alula.experts.lora import LoRAExperts
from alula.mixture import attach, observe
from alula.routers import ROUTERS, GateRouter, Seen
from alula.routers.base import pick, standardise
from zoo import build, example_batch


def gated(dim=8, names=("a", "b", "c")):
    router, experts = GateRouter(dim), LoRAExperts(in_features=dim, out_features=dim)
    for name in names:
        experts.grow(name, rank=1, alpha=1.0, dtype=torch.float32)
        router.grow(name, experts)
        torch.nn.init.normal_(router.gates[-1])
    return router


def context(routing, *, batch=2, tokens=5, **extra):
    valid = torch.ones(batch, tokens, dtype=torch.bool)
    return Context(shape=(batch, tokens), routing=routing, image_mask=None, valid=valid, active=(0, 1, 2), **extra)


def test_gate_of_one_expert_is_the_sigmoid_of_the_raw_product():
    router, u = gated(), torch.randn(2, 5, 8)
    weights = router(u, context(Routing(gate_of="b"), gate_of=1))
    torch.testing.assert_close(weights[..., 1], torch.sigmoid(u @ router.gates[1]))
    assert weights[..., [0, 2]].eq(0).all()


def test_null_options_follow_their_definitions():
    router, u = gated(), torch.randn(2, 5, 8)
    plain = router(u, context(Routing(router="gate", level="token", top_k=2)))
    torch.testing.assert_close(plain.sum(dim=-1), torch.ones(2, 5))
    kept = router(u, context(Routing(router="gate", level="token", top_k=2, null="sigmoid_keep")))
    torch.testing.assert_close(kept, plain * torch.sigmoid(u @ torch.stack(list(router.gates)).T))
    scores = router.scores(u)
    dropped = router(u, context(Routing(router="gate", level="token", top_k=2, null="threshold", threshold=0.5)))
    torch.testing.assert_close(dropped, plain * (scores >= 0.5))
    router.null_sum = torch.randn(8, dtype=torch.float64)
    null = standardise(u) @ standardise(router.null_sum) / math.sqrt(8)
    expected = softmax_of_best(torch.cat([scores, null.unsqueeze(-1)], dim=-1), top_k=2)[..., :-1]
    torch.testing.assert_close(router(u, context(Routing(router="gate", level="token", top_k=2, null="zero_expert"))), expected)


def test_an_untrained_gate_takes_no_part_and_none_trained_is_an_error():
    router = gated()
    router.gates[1].data.zero_()
    routing = Routing(router="gate", level="token", top_k=3)
    assert router(torch.randn(2, 5, 8), context(routing))[..., 1].eq(0).all()
    for gate in router.gates:
        gate.data.zero_()
    with pytest.raises(UserError, match="None of the gates"):
        router(torch.randn(2, 5, 8), context(routing))


def softmax_of_best(scores, *, top_k):
    """Softmax, top-k, renormalise, as papers write it."""
    full = scores.softmax(dim=-1)
    best, index = full.topk(top_k, dim=-1)
    return torch.zeros_like(full).scatter(-1, index, best / best.sum(dim=-1, keepdim=True))


def test_the_softmax_of_the_best_is_softmax_top_k_renormalise():
    scores = torch.randn(3, 4, 6)
    torch.testing.assert_close(pick(scores, lambda best: best, top_k=2, experts=6).dense(), softmax_of_best(scores, top_k=2))


@pytest.mark.parametrize("name", ["gate", "arrow", "analytic"])
def test_combined_level_is_finite_for_a_prompt_of_no_expert(name):
    model, processor = build("llava")
    mixtures = attach(model)
    text = example_batch("llava", processor, text_only=True)
    for expert in ("one", "two"):
        mixtures.grow(expert, rank=2)
        observe(mixtures, expert, example_batch("llava", processor), tokens=True)
    observe(mixtures, "base", text, tokens=True)
    for mixture in mixtures.sites.values():
        for gate in mixture.routers["gate"].gates:
            torch.nn.init.normal_(gate)
    mixtures.refresh()
    with torch.no_grad(), mixtures.using(Routing(router=name, level="combined", top_k=2)):
        assert model(**text).logits.isfinite().all()


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "dense"])  # trained with all its experts, never grown
def test_every_router_gives_weights_that_sum_to_at_most_one_and_permute_with_the_experts(name):
    _, processor = build("llava")
    batch = example_batch("llava", processor)

    def run(order):
        fresh, _ = build("llava")
        mixtures = attach(fresh)
        for expert in order:
            generator = torch.Generator().manual_seed(ord(expert[0]))
            mixtures.grow(expert, rank=2, generator=generator)
            for mixture in mixtures.sites.values():
                mixture.experts.B[-1].data.normal_(std=0.3, generator=generator)
                mixture.routers["gate"].gates[-1].data.normal_(generator=generator)
            observe(mixtures, expert, {**batch, "input_ids": batch["input_ids"]}, tokens=True)
        mixtures.refresh()
        mixtures.freeze()
        sums = []
        routing = Routing(router=name, level="token", top_k=2)
        with torch.no_grad(), mixtures.using(routing), mixtures.director.recording(recorder=lambda p, w, a: sums.append(w.sum(-1).max())):
            return fresh(**batch).logits, max(sums)

    (one, most), (two, _) = run(["a", "b"]), run(["b", "a"])
    assert most <= 1 + 1e-5
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


def counting(monkeypatch, module, name):
    """How often `module.name` was called."""
    calls, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: (calls.append(args), original(*args, **kwargs))[1])
    return calls


@pytest.mark.parametrize("name", ["gate", "arrow", "dense"])
def test_linears_that_take_one_input_share_one_product_and_choose_as_if_alone(name):
    model, processor = build("llava")
    mixtures = attach(model, routers=("gate", "arrow", "dense"))
    for expert in ("one", "two", "three"):
        mixtures.grow(expert, rank=2)
    for mixture in mixtures.sites.values():
        for parameter in (*mixture.routers.parameters(), *mixture.experts.B):
            torch.nn.init.normal_(parameter)
    mixtures.refresh()
    batch, chosen = example_batch("llava", processor), {}

    def logits():
        def note(path, weights, active):
            chosen.setdefault(path, []).append(weights)

        routing = Routing(router=name, level="token", top_k=2)
        with torch.no_grad(), mixtures.using(routing), mixtures.director.recording(recorder=note):
            return model(**batch).logits

    together = logits()
    kinds = {path.rpartition(".")[2]: len(mixture.together) for path, mixture in mixtures.sites.items()}
    assert kinds == {"q_proj": 3, "k_proj": 3, "v_proj": 3, "o_proj": 0, "gate_proj": 2, "up_proj": 2, "down_proj": 0}
    assert not any(mixture.cell.decided for mixture in mixtures.sites.values()), "a hidden state is held after its last use"
    for mixture in mixtures.sites.values():
        mixture.together = ()
    torch.testing.assert_close(logits(), together, rtol=1e-4, atol=1e-5)
    for one, other in chosen.values():
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_one_product_serves_all_routers_of_a_hidden_state(monkeypatch):
    routers, x = [gated(), gated(), gated()], torch.randn(2, 5, 8)
    routing = context(Routing(router="gate", level="token", top_k=2))
    alone = [router(x, routing) for router in routers]
    seen, calls = Seen(x, together=routers), counting(monkeypatch, torch.nn.functional, "linear")
    for router, expected in zip(routers, alone, strict=True):
        torch.testing.assert_close(router.choose(seen, routing).dense(), expected)
    assert len(calls) == 1


def test_scores_of_raw_tokens_are_those_of_standardised_ones():
    router, u = gated(dim=64), 3 * torch.randn(2, 5, 64) + 2
    expected = standardise(u) @ standardise(torch.stack(list(router.gates))).T / 8
    torch.testing.assert_close(router.scores(u), expected, rtol=1e-4, atol=1e-5)


def test_few_tokens_without_gradients_are_scored_as_many_with_them():
    router, u = gated(dim=64), 3 * torch.randn(2, 5, 64) + 2
    with torch.no_grad():
        torch.testing.assert_close(router.scores(u[:, :1]), router.scores(u)[:, :1], rtol=1e-4, atol=1e-5)


def test_a_gate_that_changed_is_never_routed_by_its_old_value():
    router, u = gated(), torch.randn(2, 5, 8)
    routing = context(Routing(router="gate", level="token", top_k=1))
    router.requires_grad_(False)
    before = router(u, routing)
    assert torch.equal(router(u, routing), before)
    with torch.no_grad():
        router.gates[0].copy_(-router.gates[0])
    assert not torch.equal(router(u, routing), before)
    router.gates[1] = torch.nn.Parameter(-router.gates[1], requires_grad=False)
    fresh = gated()
    fresh.load_state_dict(router.state_dict())
    assert torch.equal(router(u, routing), fresh(u, routing))


def test_nothing_as_wide_as_the_pool_is_kept_for_backward():
    names, width = tuple(f"e{number}" for number in range(200)), 16
    router, u = gated(dim=width, names=names), torch.randn(4, 50, width, requires_grad=True)
    router.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor.shape), tensor)[1], lambda tensor: tensor):
        chosen = router.choose(Seen(u), context(Routing(router="gate", level="token", top_k=2), batch=4, tokens=50))
    chosen.weights.sum().backward()
    assert all(shape[-1] != 200 for shape in kept if len(shape) == 3)
