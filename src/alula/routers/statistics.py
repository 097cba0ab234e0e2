"""Two sums per task, and the closed-form classifier they give. No sample is kept, and no order matters."""

import torch
from jaxtyping import Float
from torch import Tensor


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
