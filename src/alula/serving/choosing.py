"""Who may answer, by the name in a request, and who did. It knows no HTTP and no text."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial

from torch import Tensor

from alula.context import BASE, OFF, Routing
from alula.mixture import Mixtures
from alula.running.learn import Opened

Way = Callable[[], AbstractContextManager[object]]


def ways(opened: Opened, name: str) -> Mapping[str, Way]:
    """The names that requests can ask for, and what is entered around their generation."""
    ways: dict[str, Way] = {name: nullcontext}
    if opened.mixtures is not None and opened.mixtures.names:
        ways |= {f"{name}/{expert}": partial(opened.mixtures.using, Routing(fixed={expert: 1.0})) for expert in opened.mixtures.names}
    if len(ways) > 1 or opened.learners is not None:
        ways.setdefault(BASE, partial(_without, opened))
    return ways


class Shares:
    """A recorder (see `Context`) that adds up who had which weight, where the tensors are."""

    def __init__(self, mixtures: Mixtures | None) -> None:
        self.names = mixtures.names if mixtures is not None else []
        self._sums: dict[tuple[int, ...], Tensor] = {}
        self._count = 0

    def __call__(self, path: str, weights: Tensor, active: tuple[int, ...]) -> None:
        """Takes in one site's weights of one forward (1 x tokens x active)."""
        total = weights.float().sum(dim=(0, 1))
        self._sums[active] = self._sums[active] + total if active in self._sums else total
        self._count += weights.shape[0] * weights.shape[1]

    def mean(self) -> dict[str, float]:
        """Mean weight by name; the rest is the base model's."""
        experts = dict.fromkeys(self.names, 0.0)
        for active, total in self._sums.items():
            for index, value in zip(active, total.tolist(), strict=True):
                experts[self.names[index]] += value / self._count
        return {**experts, BASE: max(0.0, 1.0 - sum(experts.values()))}


@contextlib.contextmanager
def _without(opened: Opened) -> Iterator[None]:
    """The base model: neither experts nor learners speak."""
    with ExitStack() as stack:
        if opened.mixtures is not None:
            stack.enter_context(opened.mixtures.using(OFF))
        if opened.learners is not None:
            stack.enter_context(opened.learners.using())
        yield
