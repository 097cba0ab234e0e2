"""MoELoRA: the mixture is its equation, silent at birth, and every task trains all of it."""

import torch

from alula.context import Context, Routing
from alula.methods import METHODS
from methods_at_work import SETTINGS, begun, changed, learn, logits, teach
from zoo import build, example_batch


def test_moe_lora_equals_a_loop_over_its_experts():
    """y = W u + alpha / R * sum over all e of softmax(G u)_e B_e A_e u (arXiv 2403.08350)."""
    _, method, *_ = begun("moe_lora", rank=6, alpha=9.0, num_experts=3)
    teach(method.mixtures)
    mixture = next(iter(method.mixtures.sites.values()))
    u = torch.randn(2, 5, mixture.host.in_features)
    weights = torch.softmax(u @ torch.stack(list(mixture.routers["dense"].gates)).T, dim=-1)
    expected = mixture.host(u)
    for index, (down, up) in enumerate(zip(mixture.experts.A, mixture.experts.B, strict=True)):
        assert down.shape[0] == 2
        expected = expected + 9.0 / 6 * weights[..., index : index + 1] * (u @ down.T @ up.T)
    valid = torch.ones(2, 5, dtype=torch.bool)
    mixture.cell.context = Context(shape=(2, 5), routing=method.mixtures.routing, image_mask=None, valid=valid, active=(0, 1, 2))
    torch.testing.assert_close(mixture(u), expected)


def test_the_dense_router_with_a_smaller_k_takes_the_best_experts():
    _, method, *_ = begun("moe_lora", rank=6, num_experts=3)
    router = next(iter(method.mixtures.sites.values())).routers["dense"]
    context = Context(
        shape=(1, 4), routing=Routing(router="dense", level="token", top_k=2), image_mask=None, valid=torch.ones(1, 4), active=(0, 1, 2)
    )
    weights = router(torch.randn(1, 4, router.dim), context)
    assert (weights > 0).sum(-1).eq(2).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4))


def test_moe_lora_is_silent_at_birth_and_its_gates_are_those_of_a_linear_layer():
    base, processor = build("llava")
    batch = example_batch("llava", processor)
    base.requires_grad_(False)
    expected = logits(base, batch)
    model, _ = build("llava")
    method = METHODS["moe_lora"](model, settings=SETTINGS)
    assert torch.equal(logits(model, batch), expected)
    for mixture in method.mixtures.sites.values():
        gates = torch.stack(list(mixture.routers["dense"].gates))
        assert len(gates) == 8
        assert 0.5 < gates.abs().max() * mixture.host.in_features**0.5 <= 1
    again = METHODS["moe_lora"](build("llava")[0], settings=SETTINGS)
    assert all(torch.equal(value, again.mixtures.model.state_dict()[name]) for name, value in model.state_dict().items())


def test_every_task_trains_every_expert_and_router_of_moe_lora_and_leaves_the_base_alone():
    model, method, costs = learn("moe_lora", "one", "two", rank=4, num_experts=2)
    assert costs[0].stored_parameters == costs[1].stored_parameters == costs[0].trainable_parameters
    first = learn("moe_lora", "one", rank=4, num_experts=2)[0].state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, first[name])}
    assert moved == method.trained == set(method.stored_tensors(model))
    assert {".experts.", ".routers."} == {kind for kind in (".experts.", ".routers.") if any(kind in name for name in moved)}
    batch = example_batch("llava", build("llava")[1])
    untouched = build("llava")[0].requires_grad_(False)
    with method.base_model(model):
        method.mixtures.freeze()
        assert torch.equal(logits(model, batch), logits(untouched, batch))
    method.mixtures.detach()
    assert not changed(model)
