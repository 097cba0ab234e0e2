"""Looking at a model in the middle of its training: without dropout, with other values; afterwards it is as it was."""

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which `model` is in evaluation mode; each module gets its own mode back."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextlib.contextmanager
def holding(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which the parameters of these names have other values, for forwards without gradients.

    Only what the parameters point to is exchanged: a graph that was made before can still go backward afterwards.
    """
    known = dict(model.named_parameters())
    before = {name: known[name].data for name in values}
    for name, value in values.items():
        known[name].data = value
    try:
        yield
    finally:
        for name, value in before.items():
            known[name].data = value
