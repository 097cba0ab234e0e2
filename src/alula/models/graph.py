"""Parameters in the graph of a forward that left them out. It knows no model."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def with_parameters(out: Tensor, parameters: Iterable[Parameter]) -> Tensor:
    """`out` as it is, with those of `parameters` that train in its graph.

    They get no gradient from it; but whoever waits for each parameter's backward hears that it is over. DistributedDataParallel waits
    for all of them, for ever (unless it searches the graph, which Transformers forbids it under activation checkpointing): a process
    whose batch has no image would leave out what looks at images, and hang all others.

    Example:
        >>> used, idle = Parameter(torch.ones(1)), Parameter(torch.ones(1))
        >>> _ = idle.register_post_accumulate_grad_hook(lambda parameter: print("over, gradient", parameter.grad))
        >>> with_parameters(2 * used, [used, idle]).backward()
        over, gradient None
        >>> used.grad
        tensor([2.])
    """
    training = [parameter for parameter in parameters if parameter.requires_grad] if torch.is_grad_enabled() else []
    return _With.apply(out, *training) if training else out


def output_with_parameters(output: Any, parameters: Iterable[Parameter]) -> Any:
    """The output of one of Transformers' decoders (its own class, or a tuple), of which the first tensor is `with_parameters`."""
    out = with_parameters(output[0], parameters)
    if isinstance(output, tuple):
        return (out, *output[1:])
    output[next(iter(output))] = out
    return output


class _With(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *parameters: Tensor) -> Tensor:
        ctx.others = len(parameters)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, *(None,) * ctx.others
