"""The analytic router at token level: a closed-form classifier of the block's input."""

import torch
from jaxtyping import Float
from torch import Tensor

from alula.context import BASE, Context
from alula.errors import UserError
from alula.experts import Chosen, LoRAExperts
from alula.routers.base import ROUTERS, Router, centred, standardise
from alula.routers.seen import Seen
from alula.routers.statistics import RidgeStatistics


@ROUTERS.register("analytic")
class AnalyticRouter(Router):
    """Scores a token by the ridge classifier of `RidgeStatistics` on the input of attention or MLP of the base model.

    One router serves all linears of its block: the first to be computed decides. If general text was observed under the
    name ``base``, it competes as the null expert. Scores are multiplied by the temperature (10) before the top-k softmax.

    Source: ours (see `RidgeStatistics`).
    """

    is_shared = True
    temperature = 10.0

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.statistics = RidgeStatistics(dim)
        self._classifier: Tensor | None = None

    def grow(self, name: str, experts: LoRAExperts) -> None:
        """Notes the expert; `observe` gives it statistics. Called once per linear of the block."""
        if name not in self.names:
            self.names.append(name)

    def remove(self, name: str) -> None:
        """Forgets an expert and its statistics."""
        if name in self.names:
            self.names.remove(name)
        self.statistics.forget(name)
        self._classifier = None

    def observe(self, name: str, x: Float[Tensor, "count dim"]) -> None:
        """Adds tokens of one task (or of general text, as ``base``)."""
        self.statistics.observe(name, standardise(x))
        self._classifier = None

    def choose(self, seen: Seen, context: Context) -> Chosen:
        """Weights of the best experts (see the class).

        Raises:
            UserError: token statistics were never gathered for an expert.
        """
        temperature = self.temperature if context.routing.temperature is None else context.routing.temperature
        if self._classifier is None or self._classifier.device != seen.x.device:
            self._classifier = centred(self._in_expert_order()).to(seen.x.device)
        return self.best(seen, context, lambda products: products * seen.inverse_spread * temperature)

    def rows(self) -> Float[Tensor, "classes dim"]:
        """The classifier, for tokens that are not standardised (see `Seen.inverse_spread`)."""
        return centred(self._in_expert_order()) if self._classifier is None else self._classifier

    def _in_expert_order(self) -> Float[Tensor, "classes dim"]:
        known = self.statistics.names
        missing = [name for name in self.names if name not in known]
        if missing:
            raise UserError(
                f"Router 'analytic' at token level has no statistics of {', '.join(missing)}. "
                "Learn with an arm of that level, or gather them with `alula.observe(..., tokens=True)`, or route at level 'sample'."
            )
        order = [*self.names, BASE] if BASE in known else self.names
        rows = self.statistics.solve()
        return torch.stack([rows[known.index(name)] for name in order])

    def stored(self, name: str) -> dict[str, Tensor]:
        """The task's two sums and their count."""
        return self.statistics.stored(name)

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Of the two sums and their count."""
        return self.statistics.shapes

    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Takes the sums back."""
        self.statistics.restore(name, tensors)
        self._classifier = None
