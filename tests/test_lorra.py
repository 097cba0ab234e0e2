"""One learner and its routers, without a model: equal to equation 4 and 5 written out naively."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from alula.experts.lorra import LoRRA
from alula.routers.learner import LEARNER_ROUTERS
from learners_by_hand import lorra, router_weights

SHAPES = [  # dim, head_dim, rank, batch, tokens, features
    (32, 8, 4, 2, 7, 5),
    (64, 16, 8, 1, 3, 11),
    (30, 8, 3, 3, 4, 4),  # heads do not divide the width: the last one is filled up
    (12, 16, 2, 2, 5, 6),  # one head, wider than the model
    (48, 24, 5, 2, 6, 1),
]


def made(dim, *, head_dim, rank, scale=0.3):
    """A learner that says something."""
    learner = LoRRA(dim, head_dim=head_dim, rank=rank)
    for part in (learner.q, learner.k, learner.v, learner.o):
        torch.nn.init.normal_(part.A, std=scale)
        torch.nn.init.normal_(part.B, std=scale)
    return learner


def turning(positions, *, head_dim):
    """The rotary embedding of transformers at `positions` (batch x tokens)."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angle = positions[..., None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return lambda heads: apply_rotary_pos_emb(heads, heads, angle.cos().to(heads.dtype), angle.sin().to(heads.dtype))[0]


def fast(learner, hidden, features, *, query_at, key_at, valid, **options):
    turn, turn_back = (turning(at, head_dim=learner.head_dim) for at in (query_at, key_at))
    keys, values = learner.keys_values(features, valid=valid, rotate=turn_back)
    return learner(hidden, keys, values, rotate=turn, **options)


def example(dim, batch, tokens, features):
    hidden, seen = torch.randn(batch, tokens, dim), torch.randn(batch, features, dim)
    query_at, key_at = torch.randint(0, 50, (batch, tokens)), torch.randint(0, 50, (batch, features))
    valid = torch.rand(batch, features) > 0.3
    valid[:, 0] = True  # a row without any key is the caller's to take out
    return hidden, seen, {"query_at": query_at, "key_at": key_at}, valid


@pytest.mark.parametrize(("dim", "head_dim", "rank", "batch", "tokens", "features"), SHAPES)
def test_learner_equals_equation_4_in_value_and_gradient(dim, head_dim, rank, batch, tokens, features):
    learner = made(dim, head_dim=head_dim, rank=rank)
    hidden, seen, at, valid = example(dim, batch, tokens, features)
    hidden.requires_grad_(True)
    seen.requires_grad_(True)
    wanted = torch.randn(batch, tokens, dim)
    leaves = [hidden, seen, *learner.parameters()]
    found, expected = (
        fast(learner, hidden, seen, valid=valid, **at),
        lorra(learner, hidden, seen, visible=valid[:, None].expand(-1, tokens, -1), head_dim=head_dim, **at),
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    fast_gradients, naive_gradients = (torch.autograd.grad((out * wanted).sum(), leaves) for out in (found, expected))
    for one, other in zip(fast_gradients, naive_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("is_causal_flag", [True, False])
def test_a_causal_learner_sees_no_later_feature(is_causal_flag):
    learner, tokens = made(32, head_dim=8, rank=4), 9
    hidden, seen, at, valid = example(32, 2, tokens, tokens)
    triangle = torch.ones(tokens, tokens).tril().bool()
    how = {"causal": True} if is_causal_flag else {"mask": triangle.expand(2, 1, tokens, tokens)}
    out = fast(learner, hidden, seen, valid=valid, **at, **how)
    expected = lorra(learner, hidden, seen, visible=triangle & valid[:, None], head_dim=8, **at)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    other = seen.clone()
    other[:, 5:] = torch.randn(2, 4, 32)
    assert torch.equal(fast(learner, hidden, other, valid=valid, **at, **how)[:, :5], out[:, :5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_blocked_key_has_exactly_no_influence(dtype, scale):
    learner = made(32, head_dim=8, rank=4)
    hidden, seen, at, valid = example(32, 2, 6, 12)
    hidden, seen = hidden.to(dtype), (scale * seen).to(dtype)
    out = fast(learner, hidden, seen, valid=valid, **at)
    other = torch.where(valid[..., None], seen, (scale * torch.randn_like(seen)).to(dtype))
    assert not torch.equal(other, seen)
    assert torch.equal(fast(learner, hidden, other, valid=valid, **at), out)


def test_learner_is_exactly_silent_at_birth_with_8_d_r_parameters():
    learner = LoRRA(40, head_dim=8, rank=5)
    hidden, seen, at, valid = example(40, 2, 6, 12)
    assert torch.equal(fast(learner, hidden, seen, valid=valid, **at), torch.zeros(2, 6, 40))
    assert sum(parameter.numel() for parameter in learner.parameters()) == 8 * 40 * 5
    learner(hidden, *learner.keys_values(seen, valid=valid, rotate=lambda x: x), rotate=lambda x: x).sum().backward()
    assert learner.o.B.grad.any(), "zero, but not dead"


def test_learner_works_in_bfloat16_with_parameters_in_float32():
    learner = made(32, head_dim=8, rank=4)
    hidden, seen, at, valid = example(32, 2, 6, 12)
    exact = fast(learner, hidden, seen, valid=valid, **at)
    rough = fast(learner, hidden.bfloat16(), seen.bfloat16(), valid=valid, **at)
    assert rough.dtype == torch.bfloat16
    # bf16 has eight bits: a few of 256 of the largest value
    torch.testing.assert_close(rough.float(), exact, rtol=0.0, atol=0.05 * float(exact.detach().abs().max()))
    rough.float().square().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in learner.parameters())


def attention_weights(batch, heads, tokens, keys, valid):
    scores = torch.randn(batch, heads, tokens, keys).masked_fill(~valid[:, None, None], -torch.inf)
    return scores.softmax(dim=-1)


def marks_of(image, valid):
    return torch.stack([valid & ~image, image & valid], dim=-1).float()


def test_position_router_gives_nothing_to_padding_and_to_places_beyond_its_matrix():
    router = LEARNER_ROUTERS["position"](16, classes=3, positions=6)
    valid = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 1, 1, 1, 1, 1]]).bool()
    marks = marks_of(torch.rand(3, 10) > 0.5, valid)
    weights = attention_weights(3, 4, 10, 10, valid)
    place = torch.tensor([[99, 99, 0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7, 99, 99], [0, 1, 2, 99, 99, 3, 4, 5, 6, 7]])
    active = torch.ones(3, 10, 3).bool()
    columns = router.columns(marks, valid.cumsum(dim=1) - 1)
    found = router(torch.zeros(3, 10, 16), weights.sum(dim=1) @ columns, active=active)
    torch.testing.assert_close(found, router_weights(router.gate, weights, place=place, active=active), rtol=1e-6, atol=1e-6)


def test_mass_router_sees_the_shares_of_attention_on_text_and_image():
    router = LEARNER_ROUTERS["mass"](16, classes=2)
    valid, image = torch.ones(2, 8).bool(), torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0], [0] * 8]).bool()
    weights = attention_weights(2, 4, 8, 8, valid)
    on_image = (weights.mean(dim=1) * image[:, None]).sum(dim=-1)
    shares = torch.stack([1 - on_image, on_image], dim=-1)
    marks = marks_of(image, valid)
    scores = torch.nn.functional.silu(shares @ router.gate.weight.T + router.gate.bias)
    columns = router.columns(marks, valid.cumsum(dim=1) - 1)
    found = router(torch.zeros(2, 8, 16), weights.sum(dim=1) @ columns, active=torch.ones(2, 8, 2).bool())
    torch.testing.assert_close(found, scores.softmax(dim=-1), rtol=1e-6, atol=1e-6)


def test_hidden_router_looks_at_the_standardised_hidden_state_alone():
    router = LEARNER_ROUTERS["hidden"](16, classes=2)
    hidden, active = torch.randn(2, 8, 16), torch.ones(2, 8, 2).bool()
    assert router.columns(torch.ones(2, 8, 2), torch.arange(8).expand(2, 8)) is None
    found = router(hidden, None, active=active)
    normal = (hidden - hidden.mean(-1, keepdim=True)) / hidden.std(-1, keepdim=True, unbiased=False)
    expected = torch.nn.functional.silu(normal @ router.gate.weight.T + router.gate.bias).softmax(dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(router(3.0 * hidden + 1.0, None, active=active), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["position", "mass", "hidden"])
def test_weights_sum_to_one_over_the_learners_that_have_features(name):
    router = LEARNER_ROUTERS[name](16, classes=2)
    torch.nn.init.normal_(router.gate.weight)
    active = torch.rand(2, 8, 2) > 0.5
    columns = router.columns(torch.rand(2, 8, 2), torch.arange(8).expand(2, 8))
    sums = None if columns is None else torch.rand(2, 8, columns.shape[-1])
    found = router(torch.randn(2, 8, 16), sums, active=active)
    assert not found[~active].any()
    torch.testing.assert_close(found.sum(dim=-1), active.any(dim=-1).float())
    alone = active.sum(dim=-1) == 1
    assert torch.equal(found[alone], active[alone].float()), "a lone learner has weight 1"


def test_neither_leaves_its_weight_to_nobody():
    router = LEARNER_ROUTERS["mass"](16, classes=3)
    active = torch.tensor([[[True, True, True], [False, True, True], [False, False, True]]])
    found = router(torch.zeros(1, 3, 16), torch.rand(1, 3, 2), active=active)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(1, 3))
    assert (found[..., 2] > 0).all() and (found[0, :2, :2].sum(dim=-1) < 1).all() and not found[0, 2, :2].any()


def test_without_a_router_each_learner_that_has_features_has_weight_one():
    active = torch.rand(2, 8, 2) > 0.5
    assert torch.equal(LEARNER_ROUTERS["none"](16, classes=2)(torch.zeros(2, 8, 16), None, active=active), active.float())
