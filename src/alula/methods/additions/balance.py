"""Balance losses as an addition: the experts of sparse feed-forward networks stay in use while the model learns."""

import torch
from torch import Tensor, nn

from alula.data.collate import Collator
from alula.data.stream import Task
from alula.errors import UserError
from alula.experts.sparse_ffn import ScoreLog, SparseFFN
from alula.experts.upcycling import valid_tokens
from alula.methods.additions.base import ADDITIONS, Addition
from alula.methods.base import Method, Stage
from alula.objectives.balance import load_balance_loss, router_z_loss


@ADDITIONS.register("balance")
class Balance(Addition):
    """The load-balance and router z losses of every gate of an upcycled model (`alula.experts.upcycling`).

    Each is the mean over the sparse networks; padding does not count.

    Args:
        load_balance: weight of the load-balance loss (0 or more).
        router_z: weight of the router z loss (0 or more).

    Source: MM1 (arXiv 2403.09611): 0.01 and 0.001.

    Raises:
        UserError: a weight below 0, or a model without sparse feed-forward networks.
    """

    def __init__(
        self, method: Method, model: nn.Module, *, collator: Collator, load_balance: float = 0.01, router_z: float = 0.001
    ) -> None:
        super().__init__(method, model, collator=collator)
        if load_balance < 0 or router_z < 0:
            raise UserError(f"load_balance: {load_balance}, router_z: {router_z} came; weights from 0 up are accepted. Correct them.")
        if not any(isinstance(module, SparseFFN) for module in model.modules()):
            raise UserError(
                f"The addition 'balance' came, but {type(model).__name__} has no sparse feed-forward networks to balance. "
                "Call alula.experts.upcycling.upcycle on it first, or take the addition out."
            )
        self.weights = (float(load_balance), float(router_z))
        self._log: ScoreLog | None = None

    def begin_stage(self, model: nn.Module, task: Task, stage: Stage) -> None:
        """Listens to the gates."""
        self._stop()
        self._log = ScoreLog(model)

    def parts(self, model: nn.Module, batch: dict[str, Tensor], logits: Tensor, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Two more parts."""
        assert self._log is not None
        found = [(scores, valid_tokens(batch.get("attention_mask"), scores)) for scores in self._log.take().values()]
        if not found:  # nothing that trains lies below a gate
            return parts
        balance = torch.stack([load_balance_loss(scores, valid) for scores, valid in found]).mean()
        z = torch.stack([router_z_loss(scores, valid) for scores, valid in found]).mean()
        return {**parts, "load_balance": self.weights[0] * balance, "router_z": self.weights[1] * z}

    def end_task(self, model: nn.Module, task: Task) -> None:
        """Listens no more."""
        self._stop()

    def _stop(self) -> None:
        if self._log is not None:
            self._log.close()
        self._log = None
