"""Two sums per task, the closed-form classifier and the spread they give. No sample is kept, and no order matters."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_SPREAD = 1e-6
"""Variance within classes, as a share of the mean square, below which it is rounding (sums are stored in fp32)."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How far samples lie from the mean of their class; made by `RidgeStatistics.spread`.

    Attributes:
        means: the classes' means.
        whitening: a factor L of the inverse covariance, ``L LT``.
        expected: squared distance of a sample that was not seen, in the mean over classes; infinite if the spread is unknown.
    """

    means: Float[Tensor, "classes dim"]
    whitening: Float[Tensor, "dim dim"]
    expected: float

    def distances(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """Squared Mahalanobis distance to each class's mean over the expected one: 1 is usual, 0 if the spread is unknown."""
        apart = features.float().unsqueeze(1) - self.means.to(features.device)
        return (apart @ self.whitening.to(features.device)).square().sum(dim=-1) / self.expected


class RidgeStatistics:
    """Per class the sums ``G = sum u uT`` and ``q = sum u`` with their count, and the ridge classifier over all classes.

    ``W = (G/N + ridge * I)^-1 [q_1/N_1 ... q_E/N_E]``, columns centred. A new class adds its own sums; the result is
    exactly the classifier fitted on all data at once, whatever the order of arrival (sums are kept in fp64 per class and
    added in the order of the class names).

    Source: ours; closed-form, order-independent classifiers are known from analytic continual learning (Zhuang et al.
    2022, "ACIL", arXiv 2205.14922; McDonnell et al. 2023, "RanPAC", arXiv 2307.02251).
    """

    def __init__(self, dim: int, *, ridge: float = 1e-2) -> None:
        self.dim, self.ridge = dim, ridge
        self._gram: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}
        self._count: dict[str, float] = {}

    @property
    def names(self) -> list[str]:
        """The classes that were observed, sorted."""
        return sorted(self._count)

    @torch.no_grad()
    def observe(self, name: str, features: Float[Tensor, "count dim"]) -> None:
        """Adds rows of one class."""
        rows = features.detach().to("cpu", torch.float64)
        if name not in self._count:
            self._gram[name] = torch.zeros(self.dim, self.dim, dtype=torch.float64)
            self._sum[name], self._count[name] = torch.zeros(self.dim, dtype=torch.float64), 0.0
        self._gram[name] += rows.T @ rows
        self._sum[name] += rows.sum(dim=0)
        self._count[name] += len(rows)

    def forget(self, name: str) -> None:
        """Drops one class, if it is there."""
        for table in (self._gram, self._sum, self._count):
            table.pop(name, None)

    @torch.no_grad()
    def solve(self) -> Float[Tensor, "classes dim"]:
        """The classifier's rows in fp32, in the order of `names`."""
        total = sum(self._count[name] for name in self.names)
        gram = torch.stack([self._gram[name] for name in self.names]).sum(dim=0) / total
        means = torch.stack([self._sum[name] / self._count[name] for name in self.names])
        columns = torch.linalg.solve(gram + self.ridge * torch.eye(self.dim, dtype=torch.float64), means.T).T
        return (columns - columns.mean(dim=0)).float()

    @torch.no_grad()
    def spread(self, names: Sequence[str]) -> Spread:
        """How far from their means the samples of the classes `names` lie, by one covariance for all of them.

        The covariance within classes, pooled, is shrunk towards a multiple of the identity. Seen samples are nearer to
        their own statistics than others are. If a class of N samples has the mean distance h, one of them left out has
        ``(N/(N-1))^2 h / (1 - c h)``, with c its weight in the covariance times N/(N-1): exact for each sample
        (Sherman-Morrison), used here for their mean. Classes of one sample add nothing; without two samples that differ,
        the spread is unknown.

        Source: distance by a tied covariance: Lee et al. 2018, arXiv 1807.03888, equation 2; shrinkage: Chen et al. 2010,
        "Shrinkage algorithms for MMSE covariance estimation" (OAS), arXiv 0907.4698, equation 23; the expectation is ours.
        """
        names = sorted(names)
        counts = [self._count[name] for name in names]
        means = torch.stack([self._sum[name] / self._count[name] for name in names])
        scatters = [self._gram[name] - count * torch.outer(mean, mean) for name, count, mean in zip(names, counts, means, strict=True)]
        unknown = Spread(means=means.float(), whitening=torch.eye(self.dim), expected=torch.inf)
        freedom = sum(counts) - len(names)
        if freedom < 1:
            return unknown
        pooled = torch.stack(scatters).sum(dim=0) / freedom
        scale = pooled.trace() / self.dim
        if scale <= LEAST_SPREAD * sum(self._gram[name].trace() for name in names) / sum(counts) / self.dim:
            return unknown
        share = _oas_share(pooled, freedom)
        precision = torch.linalg.inv((1 - share) * pooled + share * scale * torch.eye(self.dim, dtype=torch.float64))
        expected = []
        for count, scatter in zip(counts, scatters, strict=True):
            if count > 1:
                near, more = (precision * scatter).sum() / count, count / (count - 1)
                expected.append(more**2 * near / (1 - (1 - share) / freedom * more * near))
        whitening = torch.linalg.cholesky((precision + precision.T) / 2)
        return Spread(means=means.float(), whitening=whitening.float(), expected=float(torch.stack(expected).mean()))

    def stored(self, name: str) -> dict[str, Tensor]:
        """One class's sums: the upper triangle of G in fp32, q and the count in fp64."""
        if name not in self._count:
            return {}
        rows, columns = torch.triu_indices(self.dim, self.dim)
        return {
            "gram": self._gram[name][rows, columns].float(),
            "sum": self._sum[name].clone(),
            "count": torch.tensor(self._count[name], dtype=torch.float64),
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what `stored` gives of a class that was observed."""
        return {"gram": (self.dim * (self.dim + 1) // 2,), "sum": (self.dim,), "count": ()}

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Takes back what `stored` gave."""
        if not tensors:
            return
        rows, columns = torch.triu_indices(self.dim, self.dim)
        gram = torch.zeros(self.dim, self.dim, dtype=torch.float64)
        gram[rows, columns] = tensors["gram"].double()
        self._gram[name] = gram + gram.triu(1).T
        self._sum[name] = tensors["sum"].double()
        self._count[name] = float(tensors["count"])


def _oas_share(covariance: Float[Tensor, "dim dim"], freedom: float) -> Float[Tensor, ""]:
    """How much of the identity to mix in, between 0 and 1 (see `RidgeStatistics.spread`)."""
    dim = len(covariance)
    square, trace_squared = covariance.square().sum(), covariance.trace() ** 2
    share = ((1 - 2 / dim) * square + trace_squared) / ((freedom + 1 - 2 / dim) * (square - trace_squared / dim))
    return share.nan_to_num(nan=1.0).clamp(min=0.0, max=1.0)
