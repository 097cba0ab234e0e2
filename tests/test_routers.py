"""Routers against their equations: order does not matter, nothing is kept but sums, the null options do what they say."""

import itertools
import math

import pytest
import torch

from alula.context import Context, Routing
from alula.errors import UserError
from alula.experts.lora import LoRAExperts
from alula.mixture import attach, observe
from alula.routers import ROUTERS, GateRouter, PromptRouter
from alula.routers.base import standardise, top_k_softmax
from alula.routers.named import ROUTINGS
from alula.routers.prompt import describe
from alula.routers.statistics import RidgeStatistics
from zoo import build, example_batch


def test_any_order_of_tasks_gives_the_same_classifier():
    data = {name: torch.randn(30, 6) + torch.randn(6) for name in ("a", "b", "c")}
    found = []
    for order in itertools.permutations(data):
        statistics = RidgeStatistics(6)
        for name in order:
            statistics.observe(name, data[name])
        found.append(statistics.solve())
    assert all(torch.equal(one, found[0]) for one in found)


def test_classifier_equals_ridge_regression_on_all_statistics_at_once():
    """W = (G/N + I/100)^-1 [q_1/N_1 ...], columns centred, from the stacked data."""
    data = {name: torch.randn(20 + 5 * i, 4, dtype=torch.float64) for i, name in enumerate(("a", "b", "c"))}
    statistics = RidgeStatistics(4)
    for name, rows in data.items():
        for part in rows.split(7):
            statistics.observe(name, part)
    everything = torch.cat(list(data.values()))
    gram = everything.T @ everything / len(everything) + 0.01 * torch.eye(4, dtype=torch.float64)
    means = torch.stack([rows.mean(dim=0) for rows in data.values()], dim=1)
    expected = torch.linalg.inv(gram) @ means
    expected = expected - expected.mean(dim=1, keepdim=True)
    # fp32 out of fp64 sums
    torch.testing.assert_close(statistics.solve(), expected.T.float(), rtol=1e-4, atol=1e-5)


def test_forgetting_a_class_restores_the_former_classifier():
    statistics = RidgeStatistics(5)
    for name in ("a", "b"):
        statistics.observe(name, torch.randn(12, 5))
    before = statistics.solve()
    statistics.observe("c", torch.randn(9, 5))
    assert statistics.solve().shape == (3, 5)
    statistics.forget("c")
    assert torch.equal(statistics.solve(), before)


def test_stored_sums_give_the_classifier_back():
    statistics, copy = RidgeStatistics(5), RidgeStatistics(5)
    for name in ("a", "b"):
        statistics.observe(name, torch.randn(40, 5))
        copy.restore(name, statistics.stored(name))
    # the Gram matrix is kept in fp32
    torch.testing.assert_close(copy.solve(), statistics.solve(), rtol=1e-3, atol=1e-4)


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
    expected = top_k_softmax(torch.cat([scores, null.unsqueeze(-1)], dim=-1), top_k=2)[..., :-1]
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


def test_top_k_softmax_equals_softmax_top_k_renormalise():
    scores = torch.randn(3, 4, 6)
    full = scores.softmax(dim=-1)
    best, index = full.topk(2, dim=-1)
    expected = torch.zeros_like(full).scatter(-1, index, best / best.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(top_k_softmax(scores, top_k=2), expected)


def test_a_prompts_description_does_not_see_padding_or_the_answer():
    hidden = torch.randn(1, 6, 4)
    image = torch.tensor([[False, True, True, False, False, False]])
    prompt = torch.tensor([[False, True, True, True, True, False]])
    changed = hidden.clone()
    changed[:, [0, 5]] = 100.0
    assert torch.equal(describe(hidden, prompt, image), describe(changed, prompt, image))


def test_prompt_router_tells_tasks_apart_and_sends_general_text_to_the_base_model():
    model, processor = build("llava")
    mixtures = attach(model)
    pictures = [example_batch("llava", processor, image_seed=seed) for seed in range(3)]
    text = example_batch("llava", processor, text_only=True)
    mixtures.grow("pictures", rank=2)
    for batch in pictures:
        observe(mixtures, "pictures", batch)
    observe(mixtures, "base", text)
    fresh = example_batch("llava", processor, image_seed=9)
    assert mixtures.director.decide(fresh).argmax(dim=-1).tolist() == [0, 0]
    assert mixtures.director.decide(text).argmax(dim=-1).tolist() == [1, 1]


def test_a_text_only_prompt_never_goes_to_an_expert_that_saw_only_images():
    router = PromptRouter(layers=(0,), dim=3, width=None)
    likeness = torch.randn(1, 8)
    for name, has_image in (("pictures", 1.0), ("texts", 0.0), ("base", 0.0)):
        rows = likeness + 0.1 * torch.randn(20, 8) if name == "pictures" else torch.randn(20, 8)
        router.observe(name, [torch.cat([rows, torch.full((20, 1), has_image)], dim=-1)])

    def ask(mark):
        prompt = torch.cat([likeness, torch.tensor([[mark]])], dim=-1)
        return router.log_weights([prompt], experts=["pictures", "texts"], temperature=None)

    assert ask(1.0).argmax().item() == 0 and ask(1.0)[0, 1] == -torch.inf
    assert ask(0.0)[0, 0] == -torch.inf and ask(0.0).isfinite().sum() == 2
    copy = PromptRouter(layers=(0,), dim=3, width=None)
    for name in router.names:
        copy.restore(name, router.stored(name))
    found = copy.log_weights([torch.ones(2, 9)], experts=["pictures"], temperature=None)
    assert found.isfinite().all()


def clouds(count, *, dim=8, classes=("a", "b", "c"), seed=0):
    """`count` samples of each of some Gaussians with one covariance, and `count` more that nobody observes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    means = {name: 12 * torch.randn(dim, generator=generator) for name in classes}
    return ({name: mean + torch.randn(count, dim, generator=generator) @ mixing for name, mean in means.items()} for _ in range(2))


def without_images(rows):
    return [torch.cat([rows, torch.zeros(len(rows), 1)], dim=-1)]


def router_of(data):
    router = PromptRouter(layers=(0,), dim=3, width=None)
    for name, rows in data.items():
        router.observe(name, without_images(rows))
    return router


def test_expected_distance_is_that_of_samples_not_seen():
    seen, unseen = [], []
    for seed in range(40):
        data, more = clouds(6, seed=seed)
        statistics = RidgeStatistics(8)
        for name, rows in data.items():
            statistics.observe(name, rows)
        spread = statistics.spread(["c", "a", "b"])
        for index, name in enumerate(("a", "b", "c")):
            seen.append(spread.distances(data[name])[:, index].mean())
            unseen.append(spread.distances(more[name])[:, index].mean())
    # 18 samples say little of 8 dimensions: a third would be missing without the correction
    assert sum(seen) / len(seen) < 0.75
    assert 0.9 < sum(unseen) / len(unseen) < 1.2


def test_spread_is_the_pooled_covariance_shrunk_by_equation_23_of_chen():
    data, _ = clouds(10)
    statistics = RidgeStatistics(8)
    for name, rows in data.items():
        statistics.observe(name, rows)
    centred = torch.cat([rows - rows.mean(dim=0) for rows in data.values()]).double()
    covariance, n, p = centred.T @ centred / 27, 27, 8
    square, trace = covariance.square().sum(), covariance.trace()
    share = ((1 - 2 / p) * square + trace**2) / ((n + 1 - 2 / p) * (square - trace**2 / p))
    assert 0 < share < 1
    expected = (1 - share) * covariance + share * trace / p * torch.eye(p, dtype=torch.float64)
    whitening = statistics.spread(list(data)).whitening.double()
    torch.testing.assert_close(torch.linalg.inv(whitening @ whitening.T), expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_far_from_every_task_goes_to_the_base_model_and_own_ones_stay():
    data, more = clouds(40)
    router, threshold = router_of(data), ROUTINGS["analytic_reject"].threshold

    def chosen(rows, **options):
        return router.log_weights(without_images(rows), experts=list(data), temperature=None, **options).argmax(dim=-1).tolist()

    stayed = sum(chosen(more[name], threshold=threshold).count(index) for index, name in enumerate(data))
    assert stayed >= 0.97 * 120
    far = more["a"] + 60 * torch.randn(8, generator=torch.Generator().manual_seed(7))
    assert set(chosen(far, threshold=threshold)) == {3}
    assert 3 not in chosen(far)


def test_rejection_does_not_depend_on_the_order_of_tasks_and_survives_storage():
    data, more = clouds(12)
    found = []
    for order in itertools.permutations(data):
        router = router_of({name: data[name] for name in order})
        found.append(router.familiarity(without_images(more["b"]), experts=["a", "b", "c"]))
    assert all(torch.equal(one, found[0]) for one in found)
    copy = router_of({})
    for name in data:
        copy.restore(name, router.stored(name))
    # the Gram matrix is kept in fp32
    torch.testing.assert_close(copy.familiarity(without_images(more["b"]), experts=["a", "b", "c"]), found[0], rtol=1e-3, atol=1e-5)
    router.observe("d", without_images(more["c"] + 100))
    router.remove("d")
    assert torch.equal(router.familiarity(without_images(more["b"]), experts=["a", "b", "c"]), found[0])


def test_the_base_model_takes_the_place_of_unfamiliar_experts_only():
    data, more = clouds(40)
    router = router_of({**data, "base": more["a"] + 30})
    ask = without_images(torch.cat([more["a"], more["b"]]))
    plain = router.log_weights(ask, experts=["a", "b"], temperature=None)
    assert torch.equal(router.log_weights(ask, experts=["a", "b"], temperature=None, threshold=0.0), plain)
    dropped = router.log_weights(ask, experts=["a", "b"], temperature=None, threshold=0.25)
    torch.testing.assert_close(dropped.exp().sum(dim=-1), torch.ones(80))
    kept = router.familiarity(ask, experts=["a", "b"]) >= 0.25
    assert (dropped[:, :2].isfinite() == kept).all()
    assert (dropped[:, 2] >= plain[:, 2]).all()


def test_prompts_that_do_not_vary_are_no_reason_to_reject():
    for rows in (torch.randn(1, 8), 20 * torch.randn(1, 8).expand(30, 8)):
        router, copy = router_of({"a": rows}), router_of({})
        copy.restore("a", router.stored("a"))
        for one in (router, copy):
            found = one.log_weights(without_images(torch.randn(4, 8)), experts=["a"], temperature=None, threshold=0.9)
            assert found.argmax(dim=-1).eq(0).all()


def test_a_threshold_reaches_the_forward_at_sample_level():
    model, processor = build("llava")
    mixtures = attach(model)
    mixtures.grow("pictures", rank=2)
    for mixture in mixtures.sites.values():
        torch.nn.init.normal_(mixture.experts.B[0])
    for seed in range(4):
        observe(mixtures, "pictures", example_batch("llava", processor, image_seed=seed))
    batch = example_batch("llava", processor, image_seed=9)

    def logits(**options):
        with torch.no_grad(), mixtures.using(Routing(**options)):
            plain = model(**batch).logits
            with mixtures.director.on_prompts(batch):
                assert torch.equal(model(**batch).logits, plain)
        return plain

    base, expert = logits(fixed={}), logits(router="analytic")
    assert not torch.equal(base, expert)
    assert torch.equal(logits(router="analytic", null="threshold", threshold=0.0), expert)
    assert torch.equal(logits(router="analytic", null="threshold", threshold=1e6), base)


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


def test_answers_do_not_change_a_prompts_decision():
    model, processor = build("llava")
    mixtures = attach(model)
    mixtures.grow("one", rank=2)
    batch = example_batch("llava", processor)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -3:] = batch["input_ids"][:, -3:]
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -3:] = 5
    features = [mixtures.director.describe({**one, "labels": labels}) for one in (batch, other)]
    for first, second in zip(*features, strict=True):
        torch.testing.assert_close(first, second)


def test_prompt_router_without_statistics_says_what_to_do():
    router = PromptRouter(layers=(0,), dim=4)
    with pytest.raises(UserError, match="no statistics of invoices"):
        router.log_weights([torch.zeros(1, 10)], experts=["invoices"], temperature=None)


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
