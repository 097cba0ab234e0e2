"""What a token-level router is: hidden states in, weights over experts out. It knows nothing of hosts."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alula.context import Context
from alula.experts.lora import LoRAExperts
from alula.registry import Registry


class Router(nn.Module, ABC):
    """Weights over the experts of one site, decided for each token.

    Attributes:
        is_shared: one router serves all linears of a block (attention or MLP); else each linear has its own.
        needs_training: its parameters are learnt in a stage after the expert's.
    """

    is_shared: bool = False
    needs_training: bool = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @abstractmethod
    def grow(self, name: str, experts: LoRAExperts) -> None:
        """Makes room for an expert that was just added."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Forgets an expert."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch tokens dim"], context: Context) -> Float[Tensor, "batch tokens experts"]:
        """fp32 weights over all experts; what they miss to 1 goes to the base model."""

    def refresh(self, experts: LoRAExperts) -> None:
        """Recomputes what depends on the experts' tensors, once they are trained. Optional."""

    @abstractmethod
    def stored(self, name: str) -> dict[str, Tensor]:
        """What must be kept of one expert to route to it again."""

    @abstractmethod
    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Takes back what `stored` gave."""


ROUTERS: Registry[type[Router]] = Registry("router")


def top_k_softmax(scores: Float[Tensor, "batch tokens experts"], *, top_k: int) -> Float[Tensor, "batch tokens experts"]:
    """Softmax over the `top_k` largest scores, zero elsewhere; the same as softmax, top-k, renormalise."""
    count = min(top_k, scores.shape[-1])
    best, index = scores.topk(count, dim=-1)
    return torch.zeros_like(scores).scatter(-1, index, best.softmax(dim=-1))


def standardise(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """LayerNorm without affine, in fp32."""
    return nn.functional.layer_norm(x.float(), x.shape[-1:])
