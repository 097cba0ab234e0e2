"""Merging: TIES and DARE are their equations, and an arm leaves no trace."""

import pytest
import torch

from alula.context import Routing
from alula.methods.merging import drop_and_rescale, ties, trim
from methods_at_work import begun, learn, logits, tasks, teach
from zoo import build, example_batch


def test_ties_on_a_matrix_by_hand():
    one = torch.tensor([[4.0, -1.0], [2.0, 0.5]])  # trimmed: 4, 2
    two = torch.tensor([[-1.0, 3.0], [-5.0, 0.2]])  # 3, -5
    three = torch.tensor([[2.0, 1.0], [0.1, -6.0]])  # 2, -6
    assert torch.equal(trim(one, density=0.5), torch.tensor([[4.0, 0.0], [2.0, 0.0]]))
    # sums 6, 3, -3, -6; of the two that speak at the third place, the one with the elected sign stays alone
    assert torch.equal(ties(torch.stack([one, two, three]), density=0.5), torch.tensor([[3.0, 3.0], [-5.0, -6.0]]))


def test_ties_of_opposites_is_zero():
    delta = torch.randn(3, 4)
    assert not ties(torch.stack([delta, -delta]), density=1.0).any()


def test_ties_of_whole_updates_that_agree_is_their_mean():
    deltas = torch.rand(3, 4, 5) + 0.1
    torch.testing.assert_close(ties(deltas, density=1.0), deltas.mean(dim=0))


def test_ties_is_that_of_peft():
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    deltas = torch.randn(3, 10, 10)
    torch.testing.assert_close(ties(deltas, density=0.3), merge_utils.ties(list(deltas), torch.ones(3), 0.3))


def test_dare_is_right_on_average_and_drops_what_it_says():
    delta = torch.randn(4, 5)
    drawn = torch.stack([drop_and_rescale(delta, drop_ratio=0.9, generator=torch.Generator().manual_seed(seed)) for seed in range(4000)])
    error = (drawn.mean(dim=0) - delta).abs()
    assert (error < 5 * delta.abs() * (0.9 / 0.1 / 4000) ** 0.5).all()  # five standard errors
    assert drawn.eq(0).float().mean() == pytest.approx(0.9, abs=0.01)
    kept = drawn[0] != 0
    torch.testing.assert_close(drawn[0][kept], delta[kept] / 0.1)


@pytest.fixture(scope="module")
def merged():
    """Three specialists by the method `merging`, with something to say."""
    model, method, _ = learn("merging", "one", "two", "three", rank=2, density=0.5, drop_ratio=0.5)
    teach(method.specialist.mixtures)
    return model, method, example_batch("llava", build("llava")[1])


def test_merging_trains_the_experts_of_specialist():
    merging = learn("merging", "one", "two", rank=2)[1]
    specialist = learn("specialist", "one", "two", rank=2)[1]
    for path, mixture in specialist.mixtures.sites.items():
        own = merging.sites[path].experts
        assert own.names == ["one", "two"]
        assert all(torch.equal(left, right) for left, right in zip([*mixture.experts.A, *mixture.experts.B], [*own.A, *own.B], strict=True))
    assert merging.mixtures is None


@pytest.mark.parametrize("way", ["linear", "ties", "dare"])
def test_an_arm_leaves_no_trace(merged, way):
    model, method, batch = merged
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arm = next(arm for arm in method.arms() if arm.name == way)
    base = build("llava")[0].requires_grad_(False)
    with arm.enter(tasks("one")[0]):
        inside = logits(model, batch)
    with pytest.raises(KeyError), arm.enter(tasks("one")[0]):
        raise KeyError
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not torch.allclose(inside, logits(base, batch), atol=1e-2)
    with method.base_model(model):
        assert torch.equal(logits(model, batch), logits(base, batch))


def test_the_linear_arm_is_the_mean_of_the_experts(merged):
    model, method, batch = merged
    with method.using("linear"):
        found = logits(model, batch)
    names = method.specialist.mixtures.names
    with method.specialist.mixtures.using(Routing(fixed=dict.fromkeys(names, 1 / 3))):
        torch.testing.assert_close(found, logits(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["ties", "dare"])
def test_an_arm_is_its_equation_in_every_linear(merged, way):
    _, method, _ = merged
    plain = {path: mixture.weight.clone() for path, mixture in method.sites.items()}
    expected = {}
    for path, mixture in method.sites.items():
        deltas = [mixture.experts.delta(name) for name in mixture.experts.names]
        if way == "ties":
            expected[path] = ties(torch.stack(deltas), density=0.5)
        else:
            generators = [method._generator(name, path) for name in mixture.experts.names]
            pairs = zip(deltas, generators, strict=True)
            expected[path] = sum(drop_and_rescale(delta, drop_ratio=0.5, generator=generator) for delta, generator in pairs) / 3
    with method.using(way):
        for path, mixture in method.sites.items():
            torch.testing.assert_close(mixture.weight, plain[path] + expected[path])


def test_a_merged_model_is_made_anew_after_each_task(monkeypatch):
    model, method, task, batch = begun("merging", rank=2, arms=("linear",))
    teach(method.specialist.mixtures)
    method.end_task(model, task)
    made = []
    monkeypatch.setattr(method, "_weight", lambda path, way, make=method._weight: made.append(path) or make(path, way))
    for _ in range(2):
        with method.using("linear"):
            one = logits(model, batch)
    assert len(made) == len(method.sites)  # once for all tasks that are scored
    method.begin_task(model, tasks("two")[0])
    with method.using("linear"):
        assert not torch.equal(logits(model, batch), one)
