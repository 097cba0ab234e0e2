"""Who speaks for each token: what routers give and experts take. It knows neither."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Weights of the chosen experts; never a row of all experts per token where few were chosen.

    Attributes:
        weights: one per slot, per token or (second axis of size 1) per sample.
        index: the expert in each slot, no expert twice for a token; ``experts`` stands for nobody. None: slot i is expert i.
        experts: how many experts there are to choose from.

    Example:
        >>> import torch
        >>> Chosen(weights=torch.tensor([[[0.75, 0.25]]]), index=torch.tensor([[[2, 0]]]), experts=3).dense().tolist()
        [[[0.25, 0.0, 0.75]]]
    """

    weights: Float[Tensor, "batch _ slots"]
    index: Int[Tensor, "batch _ slots"] | None = None
    experts: int

    @property
    def slots(self) -> int:
        """Experts that may speak at once for a token."""
        return self.weights.shape[-1]

    def of_slots(self, values: Float[Tensor, "batch _ classes"]) -> Float[Tensor, "batch _ slots"]:
        """Of one value a class the values of the classes in the slots."""
        return values if self.index is None else values.gather(-1, self.index)

    def dense(self) -> Float[Tensor, "batch _ experts"]:
        """A weight for every expert, zero for those that do not speak."""
        if self.index is None:
            return self.weights
        whole = self.weights.new_zeros(*self.weights.shape[:-1], self.experts + 1)
        return whole.scatter(-1, self.index, self.weights)[..., : self.experts]
