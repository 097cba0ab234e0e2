"""Routers over the learners of WINGS: for each token, how much of each modality's learner is added. They know no model."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from alula.registry import Registry
from alula.routers.base import standardise


class LearnerRouter(nn.Module, ABC):
    """``softmax over the classes of SiLU(scores)``: the classes are the learners and, if asked for, nobody.

    Args:
        dim: width of the hidden state.
        classes: number of learners, plus one if "neither" is a choice; that one comes last.

    Source: Zhang et al. 2024, "Wings", equation 5 (arXiv 2406.03496); the choice of neither is ours.
    """

    def __init__(self, dim: int, *, classes: int) -> None:
        super().__init__()
        self.dim, self.classes = dim, classes

    def columns(
        self, marks: Float[Tensor, "batch keys 2"], places: Int[Tensor, "batch keys"]
    ) -> Float[Tensor, "batch keys columns"] | None:
        """What attention weights are to be summed with, one row per key; None: this router looks at no attention.

        Args:
            marks: per key whether it is a text token and whether it is an image token; both zero for padding.
            places: each key's place in its row or packed document, from 0; padding does not count.
        """
        return None

    @abstractmethod
    def scores(
        self, hidden: Float[Tensor, "batch tokens dim"], sums: Float[Tensor, "batch tokens columns"] | None
    ) -> Float[Tensor, "batch tokens classes"]:
        """fp32 scores before SiLU.

        Args:
            sums: attention weights, summed over heads and over keys with `columns`.
        """

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        sums: Float[Tensor, "batch tokens columns"] | None,
        *,
        active: Bool[Tensor, "batch tokens classes"],
    ) -> Float[Tensor, "batch tokens classes"]:
        """fp32 weights over the classes; a learner without features has none, and its share goes to the others."""
        scores = functional.silu(self.scores(hidden, sums)).masked_fill(~active, -torch.inf)
        return torch.nan_to_num(scores.softmax(dim=-1))


LEARNER_ROUTERS: Registry[type[LearnerRouter]] = Registry("learner router")


@LEARNER_ROUTERS.register("position")
class PositionRouter(LearnerRouter):
    """The published router: attention weights times a matrix indexed by the position of the key.

    Args:
        positions: columns of the matrix, 4,096 in the paper's code. Attention to later positions adds nothing to the
            scores, so longer sequences are no error.
    """

    def __init__(self, dim: int, *, classes: int, positions: int = 4096) -> None:
        super().__init__(dim, classes=classes)
        self.gate = nn.Linear(positions, classes)

    def columns(self, marks: Float[Tensor, "batch keys 2"], places: Int[Tensor, "batch keys"]) -> Float[Tensor, "batch keys classes"]:
        """The matrix' columns at the keys' places."""
        inside = (marks.sum(dim=-1) > 0) & (places < self.gate.in_features)
        found = self.gate.weight.T[places.clamp(0, self.gate.in_features - 1)]
        return found * inside.unsqueeze(-1)

    def scores(self, hidden: Tensor, sums: Tensor | None) -> Tensor:
        """``u W^T + b``, where the product is in `sums` already."""
        assert sums is not None, "a router with columns is given sums"
        return sums.float() + self.gate.bias.float()


@LEARNER_ROUTERS.register("mass")
class MassRouter(LearnerRouter):
    """Scores from the share of attention that falls on text and on image tokens: free of positions and of length.

    Source: ours.
    """

    def __init__(self, dim: int, *, classes: int) -> None:
        super().__init__(dim, classes=classes)
        self.gate = nn.Linear(2, classes)

    def columns(self, marks: Float[Tensor, "batch keys 2"], places: Int[Tensor, "batch keys"]) -> Float[Tensor, "batch keys 2"]:
        """The marks themselves."""
        return marks

    def scores(self, hidden: Tensor, sums: Tensor | None) -> Tensor:
        """A linear map of the two shares, which sum to 1."""
        assert sums is not None, "a router with columns is given sums"
        shares = sums.float()
        return functional.linear(
            shares / shares.sum(dim=-1, keepdim=True).clamp(min=1e-6), self.gate.weight.float(), self.gate.bias.float()
        )


@LEARNER_ROUTERS.register("hidden")
class HiddenRouter(LearnerRouter):
    """Scores from the token's own hidden state, standardised; it looks at no attention.

    Source: the control that the paper's reviewers would ask for; ours.
    """

    def __init__(self, dim: int, *, classes: int) -> None:
        super().__init__(dim, classes=classes)
        self.gate = nn.Linear(dim, classes)

    def scores(self, hidden: Tensor, sums: Tensor | None) -> Tensor:
        """A linear map of the standardised hidden state."""
        return functional.linear(standardise(hidden), self.gate.weight.float(), self.gate.bias.float())


@LEARNER_ROUTERS.register("none")
class NoRouter(LearnerRouter):
    """Every learner with weight 1, as in the paper's first stage."""

    def scores(self, hidden: Tensor, sums: Tensor | None) -> Tensor:
        """Nothing to score."""
        return hidden.new_zeros(*hidden.shape[:-1], self.classes, dtype=torch.float32)

    def forward(self, hidden: Tensor, sums: Tensor | None, *, active: Tensor) -> Tensor:
        """One for each learner that has features."""
        return active.float()
