"""Whole prompts: what is looked at, who gets them, and which stay with the base model."""

import itertools

import pytest
import torch

from alula.context import Routing
from alula.errors import UserError
from alula.mixture import attach, observe
from alula.routers import PromptRouter
from alula.routers.named import ROUTINGS
from alula.routers.prompt import describe
from gaussian_clouds import clouds
from zoo import build, example_batch


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


def without_images(rows):
    return [torch.cat([rows, torch.zeros(len(rows), 1)], dim=-1)]


def router_of(data):
    router = PromptRouter(layers=(0,), dim=3, width=None)
    for name, rows in data.items():
        router.observe(name, without_images(rows))
    return router


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
