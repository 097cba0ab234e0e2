"""Soft targets as an addition: the backbone keeps some doubt, and with it some of what it knew."""

from torch import Tensor, nn

from alula.data.collate import Collator
from alula.errors import UserError
from alula.methods.additions.base import ADDITIONS, Addition
from alula.methods.base import Method
from alula.objectives.soft_targets import soft_target_loss


@ADDITIONS.register("soft_targets")
class SoftTargets(Addition):
    """Next-token cross-entropy against a target that gives every other token a little probability.

    Args:
        alpha: probability (0 or more, below 1) taken from the true token. Default 0.01, the paper's; it was chosen on its
            test sets, at 160 M parameters.
        dilute: the authors' published form: the loss is divided by all positions of the batch and not by its targets.

    Source: Srivastava et al. 2025, "Improving Multimodal Large Language Models Using Continual Learning"
    (arXiv 2410.19925), after Harun & Kanan (TMLR 2024). Divided by the targets, the loss has the size of the plain one.

    Raises:
        UserError: alpha out of range.
    """

    def __init__(self, method: Method, model: nn.Module, *, collator: Collator, alpha: float = 0.01, dilute: bool = False) -> None:
        super().__init__(method, model, collator=collator)
        if not 0 <= alpha < 1:
            raise UserError(f"alpha: {alpha} came; a probability from 0 up and below 1 is accepted. Choose one such as 0.01.")
        self.alpha, self.dilute = float(alpha), dilute

    def parts(self, model: nn.Module, batch: dict[str, Tensor], logits: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """The soft loss in place of the plain one."""
        return {**parts, "next_token": soft_target_loss(logits, batch["labels"], alpha=self.alpha, dilute=self.dilute)}
