"""Whether what uses a model uses its very weights: where they are, and how many tensors look like them, in each forward."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Weights:
    """Where the weights of a model were before, and in each of its forwards."""

    before: tuple[dict[str, int], int]
    forwards: list[tuple[dict[str, int], int]] = field(default_factory=list)

    @property
    def stayed(self) -> bool:
        """Every forward ran on the same memory, and no tensor of the embedding's shape came beside it (in any type)."""
        return all(found == self.before for found in self.forwards)


def _found(model: nn.Module, *, count: bool) -> tuple[dict[str, int], int]:
    shape = model.get_input_embeddings().weight.shape
    alike = sum(type(one) in (torch.Tensor, nn.Parameter) and one.shape == shape for one in gc.get_objects()) if count else 0
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}, alike


@contextmanager
def watched(model: nn.Module) -> Iterator[Weights]:
    """A block in which the weights of `model` are watched: also a copy of it runs the hook, with its own weights."""
    weights = Weights(before=_found(model, count=True))

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found, alike = _found(module, count=not weights.forwards)  # looking through all objects takes a while
        weights.forwards.append((found, alike if not weights.forwards else weights.before[1]))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield weights
    finally:
        hook.remove()
