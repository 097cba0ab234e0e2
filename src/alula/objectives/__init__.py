"""Losses as pure functions: tensors in, one scalar out. They know no model, no method and no loop."""

from alula.objectives.balance import load_balance_loss, router_z_loss
from alula.objectives.distillation import distillation_loss
from alula.objectives.next_token import at_targets, columns_needed, next_token_loss, num_targets
from alula.objectives.soft_targets import soft_target_loss

__all__ = [
    "at_targets",
    "columns_needed",
    "distillation_loss",
    "load_balance_loss",
    "next_token_loss",
    "num_targets",
    "router_z_loss",
    "soft_target_loss",
]
