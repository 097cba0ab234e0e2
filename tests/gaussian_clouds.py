"""Samples of some tasks, for tests of the routers that classify them in closed form."""

import torch


def clouds(count, *, dim=8, classes=("a", "b", "c"), seed=0):
    """`count` samples of each of some Gaussians with one covariance, and `count` more that nobody observes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    means = {name: 12 * torch.randn(dim, generator=generator) for name in classes}
    return ({name: mean + torch.randn(count, dim, generator=generator) @ mixing for name, mean in means.items()} for _ in range(2))
