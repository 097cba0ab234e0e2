"""What keeps a mixture's experts in use: losses of a router's scores. They know no model.

Source: load balance: Shazeer et al. 2017 (arXiv 1701.06538) in the form of Switch (Fedus et al. 2021, arXiv 2101.03961, eq. 4); router z:
ST-MoE (Zoph et al. 2022, arXiv 2202.08906, eq. 5). MM1 (arXiv 2403.09611) weights them with 0.01 and 0.001.
"""

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

Scores = Float[Tensor, "groups tokens experts"]
Valid = Bool[Tensor, "groups tokens"]


def load_balance_loss(scores: Scores, valid: Valid | None = None) -> Float[Tensor, ""]:
    """``experts ** 2`` times the mean over groups and experts of (share of tokens whose first choice it is) * (mean probability).

    One where the load is even, the number of experts where one of them has it all. The gradient goes through the probabilities.

    Args:
        scores: of a group's tokens, before the softmax; computed in fp32.
        valid: the tokens that count (no padding); None: all. A group without any counts as zero.

    Example:
        >>> import torch
        >>> round(load_balance_loss(torch.eye(3)[None]).item(), 4)
        1.0
    """
    probabilities = scores.float().softmax(dim=-1)
    first = functional.one_hot(probabilities.argmax(dim=-1), scores.shape[-1]).to(probabilities)
    shares, means = _group_mean(first, valid), _group_mean(probabilities, valid)
    return scores.shape[-1] ** 2 * (shares * means).mean()


def router_z_loss(scores: Scores, valid: Valid | None = None) -> Float[Tensor, ""]:
    """The mean square of the scores' logsumexp: keeps them small, so that the softmax stays exact in few bits.

    Args:
        scores, valid: as for `load_balance_loss`.
    """
    squares = scores.float().logsumexp(dim=-1).square()
    return squares.mean() if valid is None else (squares * valid).sum() / valid.sum().clamp(min=1)


def _group_mean(values: Scores, valid: Valid | None) -> Float[Tensor, "groups experts"]:
    if valid is None:
        return values.mean(dim=1)
    kept = valid.to(values).unsqueeze(-1)
    return (values * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
