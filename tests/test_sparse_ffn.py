"""Claims about one sparse feed-forward network: gating is MM1's, its output is the weighted sum of its experts, grouped or in a loop."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from alula.experts.gated_products import grouped_outputs, is_gated
from alula.experts.sparse_ffn import SparseFFN, choose_experts
from alula.experts.upcycling import upcycle
from alula.objectives import load_balance_loss, router_z_loss

CONFIG = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)


def top2_of_mm1(logits, cf=2.0):
    """The definition as published: [G,S,E] -> gates [G,S,E], load balance, z."""
    _, S, E = logits.shape
    p, capacity = logits.float().softmax(-1), int(S * cf / E)
    m1 = F.one_hot(p.argmax(-1), E).float()
    m2 = F.one_hot((p * (1 - m1)).argmax(-1), E).float()
    g1, g2 = (p * m1).sum(-1), (p * m2).sum(-1)
    lb, z = E * E * (m1.mean(1) * p.mean(1)).mean(), logits.float().logsumexp(-1).square().mean()
    k1 = m1 * (m1.cumsum(1) - m1 < capacity)
    k2 = m2 * (m2.cumsum(1) - m2 + k1.sum(1, keepdim=True) < capacity)
    total = (g1 + g2 + 1e-9)[..., None]
    return g1[..., None] / total * k1 + g2[..., None] / total * k2, lb, z


@pytest.mark.parametrize(("experts", "capacity"), [(4, 2.0), (4, 0.5), (8, 1.0), (3, 1.25), (2, 2.0)])
def test_gating_and_losses_are_those_of_mm1(experts, capacity):
    scores = torch.randn(5, 24, experts) * 2
    scores[..., 0] += 1.5  # a favourite, so that places run out
    gates, balance, z = top2_of_mm1(scores, capacity)
    weights, index = choose_experts(scores, top_k=2, capacity=capacity)
    torch.testing.assert_close(torch.zeros_like(scores).scatter(-1, index, weights.float()), gates, atol=1e-6, rtol=0)
    torch.testing.assert_close(load_balance_loss(scores), balance)
    torch.testing.assert_close(router_z_loss(scores), z)
    places = torch.zeros_like(scores).scatter(-1, index, (weights > 0).float()).sum(1)
    assert places.max() == int(24 * capacity / experts) or (weights > 0).all()
    kept = (weights > 0).all(-1)
    torch.testing.assert_close(weights[kept].sum(-1), torch.ones(int(kept.sum()), dtype=torch.float64))
    assert (choose_experts(scores, top_k=2, capacity=None)[0] > 0).all()


def test_every_expert_has_a_place_in_a_row_shorter_than_the_published_capacity_gives_one():
    weights, index = choose_experts(torch.randn(3, 7, 64), top_k=2, capacity=2.0)  # int(7 * 2 / 64) is 0
    taken = torch.zeros(3, 7, 64).scatter(-1, index, (weights > 0).float()).sum(1)
    assert taken.max() == 1 and (weights[:, 0, 0] > 0).all()


def test_balance_is_one_where_the_load_is_even_and_ignores_padding():
    even = 50.0 * torch.eye(4).repeat(1, 3, 1)
    assert load_balance_loss(even).item() == pytest.approx(1)
    one_sided = torch.zeros(1, 12, 4)
    one_sided[..., 2] = 50.0
    assert load_balance_loss(one_sided).item() == pytest.approx(4)
    valid = torch.tensor([[True] * 12 + [False] * 12])
    for loss in (load_balance_loss, router_z_loss):
        torch.testing.assert_close(loss(torch.cat([even, one_sided], dim=1), valid), loss(even))


def test_a_sparse_network_is_the_weighted_sum_of_its_experts():
    torch.manual_seed(1)
    ffn = SparseFFN([nn.Linear(6, 6) for _ in range(4)], dim=6, top_k=2, capacity=1.0)
    nn.init.normal_(ffn.gate.weight, std=2.0)
    x = torch.randn(2, 9, 6, requires_grad=True)
    for mode in (True, False):
        ffn.train(mode)
        weights, index = choose_experts(ffn.gate(x), top_k=2, capacity=1.0 if mode else None)
        by_hand = sum(weights[..., s, None] * torch.stack([e(x) for e in ffn.experts], -2).gather(
            -2, index[..., s, None, None].expand(-1, -1, 1, 6)).squeeze(-2) for s in range(2))  # fmt: skip
        torch.testing.assert_close(ffn(x), by_hand.float())
        wanted = torch.autograd.grad(by_hand.square().sum(), [x, *ffn.parameters()])
        found = torch.autograd.grad(ffn(x).square().sum(), [x, *ffn.parameters()])
        torch.testing.assert_close(found, wanted)


def test_grouped_products_give_what_the_loop_gives():
    torch.manual_seed(2)
    experts = nn.ModuleList(LlamaMLP(CONFIG).bfloat16() for _ in range(3))
    assert all(map(is_gated, experts)) and not is_gated(nn.Linear(4, 4))
    rows, index = torch.randn(20, 32, dtype=torch.bfloat16, requires_grad=True), torch.arange(20) // 8  # 8, 8, 4
    by_hand = torch.cat([expert(rows[index == i]) for i, expert in enumerate(experts)])
    found = grouped_outputs(experts, rows, index)
    torch.testing.assert_close(found, by_hand, atol=2e-2, rtol=2e-2)
    inputs = [rows, *experts.parameters()]
    for one, two in zip(
        torch.autograd.grad(found.square().sum(), inputs), torch.autograd.grad(by_hand.square().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(one, two, atol=5e-2, rtol=5e-2)


def test_a_model_whose_experts_are_computed_as_grouped_products_says_and_learns_the_same(monkeypatch):
    """On a GPU they are; here the choice is turned, the products are torch's own for a CPU."""
    torch.manual_seed(3)
    model, ids = LlamaForCausalLM(CONFIG).bfloat16(), torch.arange(24).view(2, 12)
    (path,) = upcycle(model, experts=3, init="fresh", capacity=1.0)
    found = []
    for is_grouped in (False, True):
        monkeypatch.setattr("alula.experts.sparse_ffn.can_group", lambda experts, rows, chosen=is_grouped: chosen)
        model.zero_grad()
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.get_submodule(path).parameters()]
        found.append((out.logits, *gradients))
    for looped, grouped in zip(*found, strict=True):
        torch.testing.assert_close(grouped, looped, atol=3e-2, rtol=3e-2)
        assert grouped.abs().sum() > 0
