"""Soft targets: a little of each target's probability goes to every other token. It knows no model."""

from jaxtyping import Float, Int
from torch import Tensor

from alula.objectives.next_token import at_targets


def soft_target_loss(
    logits: Float[Tensor, "batch last vocab"], labels: Int[Tensor, "batch tokens"], *, alpha: float = 0.01, dilute: bool = False
) -> Float[Tensor, ""]:
    """The mean cross-entropy, in nats and in fp32, against 1 - alpha on the true token and alpha / (vocab - 1) on each other.

    The same as label smoothing with epsilon = alpha * vocab / (vocab - 1).

    Args:
        logits, labels: as for `at_targets`.
        alpha: probability (0-1) taken from the true token; 0 is `next_token_loss`.
        dilute: divide by all positions instead of the targets, as the authors' code does: the loss shrinks by the share of
            targets among the positions, padding included.

    Without a single target the mean is undefined and nan is returned.

    Source: Harun & Kanan (TMLR 2024); Srivastava et al. 2025 (arXiv 2410.19925), whose code builds the targets in the dtype
    of the logits and divides by all positions.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 3, 4)
        >>> round(soft_target_loss(logits, torch.tensor([[-100, 2, -100]]), alpha=0.1).exp().item(), 3)
        4.0
    """
    scores, targets = at_targets(logits, labels)
    log_probabilities = scores.log_softmax(dim=-1)
    true = -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    others = -log_probabilities.sum(dim=-1) - true
    loss = (1 - alpha) * true + alpha / (log_probabilities.shape[-1] - 1) * others
    return loss.sum() / labels[:, 1:].numel() if dilute else loss.mean()
