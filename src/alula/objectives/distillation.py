"""Distillation: a student's distribution is drawn to a teacher's on the targets of a batch. It knows no model."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from alula.objectives.next_token import at_targets


def distillation_loss(
    logits: Float[Tensor, "batch last vocab"],
    teacher: Float[Tensor, "batch last vocab"],
    labels: Int[Tensor, "batch tokens"],
    *,
    temperature: float = 2.0,
) -> Float[Tensor, ""]:
    """The mean over the targets of KL(teacher || student), in nats and in fp32; 0 where both say the same.

    Args:
        logits: as for `at_targets`.
        teacher: the teacher's scores, without gradient.
        labels: only says where the targets are.
        temperature: divides both scores before the softmax (above 0).

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", sec. 2 (arXiv 1503.02531), with its factor
    temperature ** 2, so that gradients keep their size; temperature 2 as in Li & Hoiem 2017 (arXiv 1606.09282), eq. 2, which
    has no such factor and the cross-entropy in place of the divergence: the same gradient.

    Example:
        >>> import torch
        >>> logits = torch.randn(1, 3, 4)
        >>> distillation_loss(logits, logits, torch.tensor([[-100, 2, -100]])).item()
        0.0
    """
    student, known = ((at_targets(scores, labels)[0] / temperature).log_softmax(dim=-1) for scores in (logits, teacher))
    return functional.kl_div(student, known, reduction="batchmean", log_target=True) * temperature**2
