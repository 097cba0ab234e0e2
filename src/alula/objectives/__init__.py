"""Losses as pure functions: tensors in, one scalar out. They know no model, no method and no loop."""

from alula.objectives.next_token import next_token_loss, num_targets

__all__ = ["next_token_loss", "num_targets"]
