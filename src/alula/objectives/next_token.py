"""Next-token prediction on the targets of a batch. It knows no model."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

IGNORED = -100


def num_targets(labels: Int[Tensor, "batch tokens"]) -> int:
    """How many tokens `next_token_loss` counts: the first token of a row has no predecessor and never is one."""
    return int((labels[:, 1:] != IGNORED).sum())


def next_token_loss(logits: Float[Tensor, "batch tokens vocab"], labels: Int[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
    """The mean negative log-likelihood of the targets, in nats, computed in fp32.

    Args:
        logits: the scores of position t judge the label of position t + 1.
        labels: token ids; -100 where nothing is to be learnt.

    Without a single target the mean is undefined and nan is returned; the training loop refuses such steps.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 3, 4)
        >>> round(next_token_loss(logits, torch.tensor([[-100, 2, -100]])).exp().item(), 3)
        4.0
    """
    is_target = labels[:, 1:] != IGNORED
    # Selected before the cast: an fp32 copy of all logits of a long prompt would be the largest tensor of the step.
    return functional.cross_entropy(logits[:, :-1][is_target].float(), labels[:, 1:][is_target])
