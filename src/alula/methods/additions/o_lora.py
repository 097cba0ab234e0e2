"""O-LoRA: each task's expert learns in directions that no earlier expert reads."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alula.context import Routing
from alula.data.collate import Collator
from alula.data.stream import Task
from alula.errors import UserError
from alula.methods.additions.base import ADDITIONS, Addition
from alula.methods.base import Arm, Method, Stage
from alula.mixture import Mixtures


@ADDITIONS.register("o_lora")
class OLoRA(Addition):
    """Adds ``weight * sum over sites and earlier experts i of the squared entries of A_i A_t'``, while expert t trains.

    The earlier experts, frozen, speak along with it, each with weight 1. The arm ``sum`` uses all experts that way; other
    arms of the method stay, ``arms: []`` takes them out.

    Args:
        weight: of the penalty (0 or more): lambda_1. Default 0.5, that of the authors' scripts.

    Source: Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning" (arXiv 2310.14152),
    sec. 3. Its equation squares the entries, its code takes their absolute values; here the equation counts. A is the inner
    factor of ``B A x``, as in its code (``lora_A``). The code's further penalty on the new factors has weight 0 in its
    scripts and is left out. There on the query and value projections: set ``linears``.

    Raises:
        UserError: a negative weight, or a method that does not give each task a LoRA expert.
    """

    def __init__(self, method: Method, model: nn.Module, *, collator: Collator, weight: float = 0.5) -> None:
        super().__init__(method, model, collator=collator)
        if method.mixtures is None or method.shares_parameters:
            raise UserError(
                f"o_lora came for {method.name}, which has no LoRA expert per task. Methods that grow one (routed, specialist) "
                "accept it. Choose one of them."
            )
        if weight < 0:
            raise UserError(f"weight: {weight} came; 0 or more is accepted. Correct it.")
        self.mixtures: Mixtures = method.mixtures
        self.weight = float(weight)
        self._task = ""

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Where the new expert speaks alone, the earlier ones join in."""
        self._task = task.name
        if self.mixtures.routing.fixed == {task.name: 1.0}:
            self.mixtures.routing = self._all()

    def parts(self, model: nn.Module, batch: dict[str, Tensor], logits: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The overlap beside the other parts; none in the first task, nor where no expert trains."""
        new = self.mixtures.index(self._task)
        found = []
        for mixture in self.mixtures.sites.values():
            down = list(mixture.experts.A)
            if down[new].requires_grad and new > 0:
                found.append(overlap(torch.cat(down[:new]), down[new]))
        return {**parts, "o_lora": self.weight * torch.stack(found).sum()} if found else parts

    def arms(self, arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
        """The method's, and all experts at once."""
        return (*arms, Arm(name="sum", enter=lambda task: self.mixtures.using(self._all())))

    def _all(self) -> Routing:
        return Routing(fixed=dict.fromkeys(self.mixtures.names, 1.0))


def overlap(earlier: Float[Tensor, "ranks dim"], new: Float[Tensor, "rank dim"]) -> Float[Tensor, ""]:
    """The sum of the squared inner products of the rows of both; 0 where the two row spaces are orthogonal."""
    return (earlier.detach().float() @ new.float().T).square().sum()
