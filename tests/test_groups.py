"""Two-level choice: exact where every group is looked into, near to it on clustered vectors, and a router's option."""

import pytest
import torch

from alula.context import Context, Routing
from alula.errors import UserError
from alula.experts import LoRAExperts
from alula.routers import ROUTERS
from alula.routers.groups import Groups


def clustered(count=600, *, dim=64, clusters=30, seed=0):
    """Vectors around some directions, and tokens that each suit one of the vectors."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, dim, generator=generator)
    rows = centres[torch.randint(clusters, (count,), generator=generator)] + 0.3 * torch.randn(count, dim, generator=generator)
    tokens = rows[torch.randint(count, (200,), generator=generator)] + 0.3 * torch.randn(200, dim, generator=generator)
    return rows, tokens.unsqueeze(0)


def recall(rows, tokens, groups, *, top_k=2):
    exact = (tokens @ rows.T).topk(top_k, dim=-1).indices
    _, found = Groups(rows).best(tokens, top_k=top_k, groups=groups)
    return (exact.unsqueeze(-1) == found.unsqueeze(-2)).any(dim=-1).float().mean().item()


def test_recall_on_clustered_vectors_is_high_with_few_groups_and_exact_with_all():
    rows, tokens = clustered()
    one, four, everything = (recall(rows, tokens, groups) for groups in (1, 4, 600))
    assert 0.6 < one <= four
    assert four > 0.9
    assert everything == 1.0
    groups = Groups(rows)
    assert (1 + 4) * len(groups.sizes) < len(rows) / 4, "hardly fewer products than with all"


@pytest.mark.parametrize("either_sign", [False, True])
def test_looking_into_every_group_gives_the_exact_products_and_their_gradients(either_sign):
    rows, tokens = clustered(count=40, clusters=5)
    rows[3] = 0  # a gate never trained: in no group
    groups, x, y = Groups(rows, either_sign=either_sign), tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    best, index = groups.best(x, top_k=3, groups=len(groups.sizes))
    products = y @ rows.T
    expected, places = (products.abs() if either_sign else products.index_fill(-1, torch.tensor(3), -9e9)).topk(3, dim=-1)
    torch.testing.assert_close(best, expected)
    assert torch.equal(index, places)
    best.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_slots_beyond_what_the_groups_hold_are_nobodys():
    best, index = Groups(torch.eye(9)).best(torch.eye(9).unsqueeze(0), top_k=9, groups=1)
    held = best.isfinite()
    assert held.any(dim=-1).all() and not held.all()
    assert torch.equal(held, index < 9) and index.max() == 9


@pytest.mark.parametrize("name", ["gate", "arrow", "dense"])
def test_a_router_in_two_levels_gives_the_weights_it_gives_in_one(name):
    router, experts = ROUTERS[name](12), LoRAExperts(in_features=12, out_features=12)
    for number in range(20):
        experts.grow(f"e{number}", rank=2, alpha=2.0, dtype=torch.float32)
        torch.nn.init.normal_(experts.B[number])
        router.grow(f"e{number}", experts)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    router.refresh(experts)
    u, valid = torch.randn(2, 6, 12), torch.ones(2, 6, dtype=torch.bool)

    def weights(**options):
        routing = Routing(router=name, level="token", top_k=2, **options)
        return router(u, Context(shape=(2, 6), routing=routing, image_mask=None, valid=valid, active=tuple(range(20))))

    torch.testing.assert_close(weights(groups=20), weights())
    torch.testing.assert_close(weights(groups=1).sum(dim=-1), torch.ones(2, 6))


def test_groups_are_refused_where_every_expert_must_be_compared():
    router, experts = ROUTERS["gate"](4), LoRAExperts(in_features=4, out_features=4)
    experts.grow("one", rank=1, alpha=1.0, dtype=torch.float32)
    router.grow("one", experts)
    torch.nn.init.normal_(router.gates[0])
    routing = Routing(router="gate", level="token", null="threshold", groups=2)
    valid = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(UserError, match="Groups go with"):
        router(torch.randn(1, 3, 4), Context(shape=(1, 3), routing=routing, image_mask=None, valid=valid, active=(0,)))


def test_of_no_tokens_nobody_is_the_best():
    best, index = Groups(torch.randn(6, 4)).best(torch.zeros(2, 0, 4), top_k=2, groups=1)
    assert best.shape == index.shape == (2, 0, 2)
