"""The contrast of images with texts over the global batch. It knows no encoder.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", figure 3, https://arxiv.org/abs/2103.00020,
with the clamp of its section 2.5.
"""

import torch
from jaxtyping import Float
from torch import Tensor, distributed
from torch.autograd.function import FunctionCtx
from torch.nn import functional

START = 2.659260036932778
"""The first value of the logarithm of the scale: ``ln(1 / 0.07)``."""
LARGEST_SCALE = 100.0

Rows = Float[Tensor, "pairs dim"]


def clip_loss(images: Rows, texts: Rows, log_scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The mean of two cross-entropies, in nats and in fp32: each image among all texts, each text among all images.

    Args:
        images, texts: row i of one belongs to row i of the other; normalised here.
        log_scale: the scores are ``min(exp(log_scale), 100)`` times the cosines.

    Example:
        >>> round(clip_loss(torch.eye(2), torch.eye(2), torch.tensor(0.0)).item(), 4)
        0.3133
    """
    images, texts = (functional.normalize(rows.float(), dim=-1) for rows in (images, texts))
    scores = log_scale.float().exp().clamp(max=LARGEST_SCALE) * images @ texts.T
    own = torch.arange(len(scores), device=scores.device)
    return (functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)) / 2


def gathered(rows: Rows) -> Rows:
    """The rows of all processes, in the order of the processes, with a gradient; `rows` itself in one process.

    Each process then computes the loss of the whole batch. The gradient that `rows` gets is summed over the processes' losses, so losses
    that are weighted to sum up to one (or parameter gradients that are averaged) give exactly the gradient of one process with it all.

    Args:
        rows: as many on each process.
    """
    return _Gather.apply(rows) if distributed.is_initialized() else rows  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """torch's own gather with a gradient is deprecated for a private one."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        summed = gradient.contiguous()
        distributed.all_reduce(summed)
        return summed.chunk(distributed.get_world_size())[distributed.get_rank()]
