"""Two-level choice for pools of thousands: first groups of like vectors, then vectors of the best groups. It knows no router."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

ROUNDS = 10


class Groups:
    """Vectors in groups of like direction.

    A token is compared with a group's direction first, and only with the vectors of the groups that suit it best: with E vectors in
    about ``sqrt(E)`` groups, ``(1 + groups) * sqrt(E)`` products instead of E. A vector in another group than its likes is missed;
    benchmarks/two_level.py measures how often.

    Args:
        rows: the vectors; those of zeros are in no group.
        either_sign: a vector and its opposite are alike (Arrow's prototypes have no sign).

    Source: k-means of directions, as in inverted file indices (Jégou et al. 2011, "Product Quantization", sec. 4).

    Example:
        >>> groups = Groups(torch.eye(4))
        >>> _, index = groups.best(torch.tensor([[[0.0, 0.0, 3.0, 0.0]]]), top_k=1, groups=1)
        >>> index.tolist()
        [[[2]]]
    """

    @torch.no_grad()
    def __init__(self, rows: Float[Tensor, "classes dim"], *, either_sign: bool = False) -> None:
        self.rows, self.either_sign = rows, either_sign
        used = rows.ne(0).any(dim=-1).nonzero().squeeze(1)
        if not len(used):
            used = torch.arange(len(rows), device=rows.device)
        directions = functional.normalize(rows[used].float(), dim=-1)
        count = min(math.ceil(math.sqrt(len(used))), len(used))
        self.directions, assigned = self._cluster(directions, count)
        sizes = torch.bincount(assigned, minlength=count)
        self.members = torch.full((count, int(sizes.max())), len(rows), device=rows.device)
        for group in range(count):
            inside = used[assigned == group]
            self.members[group, : len(inside)] = inside
        self.sizes = sizes.tolist()

    def best(
        self, x: Float[Tensor, "batch tokens dim"], *, top_k: int, groups: int
    ) -> tuple[Float[Tensor, "batch tokens best"], Int[Tensor, "batch tokens best"]]:
        """The largest products of each token among its `groups` best groups, and whose they are.

        With `either_sign`, their sizes. Where a token's groups hold fewer than `top_k` vectors, the rest is minus infinity and nobody's.
        """
        flat = x.reshape(-1, x.shape[-1])
        if not len(flat):
            return x.new_zeros(*x.shape[:2], top_k), self.members.new_zeros(*x.shape[:2], top_k)
        with torch.no_grad():
            chosen = self._fit(flat @ self.directions.T).topk(min(groups, len(self.sizes)), dim=-1).indices
            order = chosen.flatten().argsort(stable=True)
            counts = torch.bincount(chosen.flatten(), minlength=len(self.sizes)).tolist()
        widest, parts = self.members.shape[1], []
        tokens = order.div(chosen.shape[1], rounding_mode="floor").split(counts)
        for group, size in enumerate(self.sizes):
            if counts[group]:
                products = flat[tokens[group]] @ self.rows[self.members[group, :size]].T
                parts.append(functional.pad(self._fit(products), (0, widest - size), value=-math.inf))
        found = torch.cat(parts)[order.argsort()].view(len(flat), -1)
        best, place = found.topk(min(top_k, found.shape[1]), dim=-1)
        index = self.members[chosen].flatten(1).gather(-1, place)
        return best.view(*x.shape[:2], -1), index.view(*x.shape[:2], -1)

    def _fit(self, products: Tensor) -> Tensor:
        return products.abs() if self.either_sign else products

    def _cluster(self, directions: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Centres by k-means, from fixed first ones: the same vectors give the same groups."""
        first = torch.randperm(len(directions), generator=torch.Generator().manual_seed(0))[:count].to(directions.device)
        centres = directions[first]
        for _ in range(ROUNDS):
            products = directions @ centres.T
            fit, assigned = self._fit(products).max(dim=-1)
            signs = products.gather(-1, assigned.unsqueeze(1)).sign() if self.either_sign else 1.0
            sums = torch.zeros_like(centres).index_add_(0, assigned, directions * signs)
            empty = torch.bincount(assigned, minlength=count) == 0
            sums[empty] = directions[fit.argsort()[: int(empty.sum())]]  # a centre that lost all its vectors takes a lonely one
            centres = functional.normalize(sums, dim=-1)
        return centres, self._fit(directions @ centres.T).argmax(dim=-1)
