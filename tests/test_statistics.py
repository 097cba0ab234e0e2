"""The closed-form classifier and the spread of samples against their equations: order does not matter, nothing is kept but sums."""

import itertools

import torch

from alula.routers.statistics import RidgeStatistics
from gaussian_clouds import clouds


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
