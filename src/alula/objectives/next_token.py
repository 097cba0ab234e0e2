"""Next-token prediction on the targets of a batch. It knows no model."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

IGNORED = -100


def num_targets(labels: Int[Tensor, "batch tokens"]) -> int:
    """How many tokens `next_token_loss` counts: the first token of a row has no predecessor and never is one."""
    return int((labels[:, 1:] != IGNORED).sum())


def columns_needed(labels: Int[Tensor, "batch tokens"]) -> int:
    """How many of the last columns of the logits `at_targets` reads; all of them where there is no target.

    Example:
        >>> import torch
        >>> columns_needed(torch.tensor([[-100, -100, -100, 7], [-100, -100, 5, -100]]))
        3
    """
    found = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()
    return labels.shape[1] - (int(found[0]) if len(found) else 0)


def at_targets(
    logits: Float[Tensor, "batch last vocab"], labels: Int[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "targets vocab"], Int[Tensor, " targets"]]:
    """The scores, in fp32, that judge each target, and the targets, row by row.

    Args:
        logits: the scores of position t judge the label of position t + 1. Columns that no row needs may be missing at the start
            (`columns_needed`): both ends are at the same token.
        labels: token ids; -100 where nothing is to be learnt.
    """
    labels = labels[:, -logits.shape[1] :]
    is_target = labels[:, 1:] != IGNORED
    # Selected before the cast: an fp32 copy of all logits of a long prompt would be the largest tensor of the step.
    return logits[:, :-1][is_target].float(), labels[:, 1:][is_target]


def next_token_loss(logits: Float[Tensor, "batch last vocab"], labels: Int[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
    """The mean negative log-likelihood of the targets, in nats, computed in fp32.

    Args:
        logits, labels: as for `at_targets`.

    Without a single target the mean is undefined and nan is returned; the training loop refuses such steps.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 3, 4)
        >>> round(next_token_loss(logits, torch.tensor([[-100, 2, -100]])).exp().item(), 3)
        4.0
    """
    return functional.cross_entropy(*at_targets(logits, labels))
