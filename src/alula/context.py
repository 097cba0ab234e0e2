"""What routers and experts may see besides the hidden state: built once per forward, handed down, never kept on a module.

It knows tensors and names, no model and no router.
"""

import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

KEYWORD = "alula_context"
BASE = "base"
"""The name of the null expert: the untouched model."""

Told = tuple[tuple[tuple[int, float], ...], ...]
"""Per sample the experts that speak, each with its weight."""

Recorder = Callable[[str, Float[Tensor, "batch tokens active"], tuple[int, ...]], None]
Observer = Callable[[str, str, Float[Tensor, "batch tokens dim"], Bool[Tensor, "batch tokens"]], None]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How experts are chosen. One of three forms:

    * ``Routing(router="analytic", level="sample")``: a router decides, per token, per sample, or both combined;
    * ``Routing(fixed={"invoices": 1.0})``: these experts with these weights for everybody (task level, oracle, training);
      ``Routing(fixed={})`` is the base model;
    * ``Routing(gate_of="invoices")``: that expert scaled by its own sigmoid gate (stage 2 of PHATGOOSE).

    Attributes:
        level: ``sample`` is decided on the prompt and frozen for the answer; ``token`` anew for each token and layer;
            ``combined`` takes the sample's log-weights as prior and the token's scores as likelihood.
        top_k: experts that speak at once (at token level) or per sample.
        temperature: multiplies the scores before the softmax; None is the router's own.
        null: what happens to a token (or, at level ``sample``, a prompt) that belongs to no task: ``none``, ``zero_expert``,
            ``sigmoid_keep`` or ``threshold`` (specification of routing-based continual learning; the paper's own choice is
            unknown).
        threshold: with ``null="threshold"`` the score under which a gate's expert is dropped; at level ``sample`` the least
            familiarity (`PromptRouter.familiarity`) with which a prompt is given to an expert.
        groups: how many groups of like experts a token-level router looks into for each token, in pools of hundreds and more
            (`alula.routers.groups`); 0: it compares each token with every expert.
    """

    router: str | None = None
    level: str = "sample"
    top_k: int = 1
    temperature: float | None = None
    null: str = "none"
    threshold: float = 0.0
    fixed: Mapping[str, float] | None = None
    gate_of: str | None = None
    groups: int = 0


OFF = Routing(fixed={})


@dataclass(frozen=True, eq=False)
class Decoding:
    """What stays as it is throughout the answers of a batch; the same object for all their tokens, another for other answers.

    Attributes:
        told: who speaks, decided on the prompts; None: each layer's router decides, for each token.
        plans: what layers looked up for these answers, by layer.
    """

    routing: Routing
    told: Told | None
    plans: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Context:
    """One forward's knowledge.

    Attributes:
        shape: batch and tokens of this forward.
        image_mask: which tokens are image tokens; None where the call came without token ids.
        valid: which tokens are not padding.
        weights: per sample, over `active` experts; None where each mixture's own router decides per token.
        active: indices of the experts that may speak; empty is the base model.
        prior: per sample log-weights over all experts, at level ``combined``.
        decoding: what stays as it is throughout the answers that are being decoded, a token at a time; None outside decoding.
    """

    shape: tuple[int, int]
    routing: Routing
    image_mask: Bool[Tensor, "batch tokens"] | None
    valid: Bool[Tensor, "batch tokens"]
    active: tuple[int, ...]
    weights: Float[Tensor, "batch active"] | None = None
    prior: Float[Tensor, "batch experts"] | None = None
    gate_of: int | None = None
    recorder: Recorder | None = None
    observer: Observer | None = None
    decoding: Decoding | None = None

    def per_row(self, values: Float[Tensor, "batch classes"], x: Tensor) -> Float[Tensor, "rows 1 classes"]:
        """Per-sample `values` for the rows of `x`; keys of cross-attention come as several rows (tiles) per sample."""
        if x.shape[0] != self.shape[0]:
            values = values.repeat_interleave(x.shape[0] // self.shape[0], dim=0)
        return values.unsqueeze(1)


T = TypeVar("T")


class Variable(Generic[T]):
    """A `ContextVar` that can be copied together with the handle it belongs to; the copy is at the default.

    Example:
        >>> import copy
        >>> speaking = Variable("speaking", "everybody")
        >>> token = speaking.set("nobody")
        >>> copy.deepcopy(speaking).get(), speaking.get()
        ('everybody', 'nobody')
    """

    def __init__(self, name: str, default: T) -> None:
        self._name, self._default = name, default
        self._here: ContextVar[T] = ContextVar(name, default=default)

    def get(self) -> T:
        """The value here and now."""
        return self._here.get()

    def set(self, value: T) -> Token[T]:
        """Gives it another value, in this thread or task."""
        return self._here.set(value)

    def reset(self, token: Token[T]) -> None:
        """Takes back what `set` did."""
        self._here.reset(token)

    def __reduce__(self) -> tuple[type["Variable[T]"], tuple[str, T]]:
        return type(self), (self._name, self._default)


class PerThread(threading.local):
    """What modules share during one forward: each thread has its own, and a copy starts empty."""

    def __reduce__(self) -> tuple[type["PerThread"], tuple[()]]:
        return type(self), ()


class Cell(PerThread):
    """What the mixtures of one decoder layer share during one forward of that layer.

    Linear layers get no keywords from Transformers; the attention of their layer does. A tap on it puts the context
    here, also when the layer is recomputed under activation checkpointing. `decided` holds what was decided or computed for the
    siblings of the mixture that did it.
    """

    def __init__(self) -> None:
        self.context: Context | None = None
        self.decided: dict[tuple, Any] = {}

    def enter(self, context: Context | None) -> None:
        """Starts a forward of this layer."""
        self.context = context
        self.decided = {}


def prompt_mask(valid: Bool[Tensor, "batch tokens"], labels: Tensor | None) -> Bool[Tensor, "batch tokens"]:
    """The tokens before a row's first target: all a sample-level decision may look at."""
    if labels is None:
        return valid
    answered = (labels != -100).to(torch.int8).cumsum(dim=1) > 0
    return valid & ~answered
