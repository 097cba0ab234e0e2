"""The mixture around one decoder layer's feed-forward network: host + adapters + router."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from alula.context import PerThread
from alula.errors import UserError
from alula.experts.adapter import Adapter
from alula.routers.instruction import Choice, HardRouter

KEYWORD = "alula_adapters"
ALL, FIRST, NONE = "all", "first", "none"
"""Who may speak: all by the router, the first adapter for everybody (stage 1), the host alone."""

Recorder = Callable[[str, Choice, Bool[Tensor, "batch tokens"]], object]
"""Is told a site's path, what its router chose, and which tokens are no padding."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One forward's knowledge; it travels to the attention modules as a keyword, and from their taps to the sites."""

    speaking: str
    instruction: Float[Tensor, "batch width"] | None
    valid: Bool[Tensor, "batch tokens"]
    recorder: Recorder | None


class Passed(PerThread):
    """What the tap on a layer's attention left for the feed-forward network of that layer.

    Attributes:
        call: the attention's keyword, or `outer` where a decoder's layers hand no keywords on (GPT-J, Falcon, BLOOM).
        outer: the call of the whole model, while it runs.
    """

    call: Call | None = None
    outer: Call | None = None


class AdapterMixture(nn.Module):
    """``host(x) + adapter_k(x)`` with the router's k, in place of one feed-forward network.

    Every adapter that may be chosen computes all rows, and the choice picks from them: so an output does not depend on what the other
    rows of the batch chose, not in its last bit, and every process of a distributed training has every gradient. Without gradients only
    those compute that somebody chose.

    Args:
        host: the frozen network; of a tuple that it gives (a mixture of experts of its own) the first is added to.
        router: None for a single adapter.
        path: the host's name in the model.
        index: of its decoder layer.
    """

    def __init__(self, host: nn.Module, *, adapters: list[Adapter], router: HardRouter | None, path: str, index: int) -> None:
        super().__init__()
        self.host, self.router, self.path, self.index = host, router, path, index
        self.adapters = nn.ModuleList(adapters)
        self.passed = Passed()

    def forward(self, x: Float[Tensor, "batch tokens dim"], *args: Any, **kwargs: Any) -> Any:
        """The host's output with an adapter's in it."""
        out, call = self.host(x, *args, **kwargs), self.passed.call
        if call is None:
            raise UserError(
                f"{self.path} was called without its keyword, so its adapters cannot be chosen. Call the model that `attach_adapters` was "
                "given, not a part of it (the `generate` of BLIP-2 does so), or `detach` first. If activations are recomputed (gradient "
                "checkpointing), turn that off: this model's layers hand no keywords on, so nobody knows the call that is repeated."
            )
        if call.speaking == NONE:
            return out
        added = self.added(x, call)
        return (out[0] + added.to(out[0].dtype), *out[1:]) if isinstance(out, tuple) else out + added.to(out.dtype)

    def added(self, x: Float[Tensor, "batch tokens dim"], call: Call) -> Float[Tensor, "batch tokens dim"]:
        """What the chosen adapter says to each token."""
        if self.router is None or call.speaking == FIRST:
            return self.adapters[0](x)
        choice = self.router(x, call.instruction)
        if call.recorder is not None:
            call.recorder(self.path, choice, call.valid)
        is_sample = choice.index.dim() == 1
        index, factor = (value.unsqueeze(1) if is_sample else value for value in (choice.index, choice.factor))
        asked = range(len(self.adapters)) if torch.is_grad_enabled() else index.unique().tolist()
        said = x.new_zeros(())
        for number in asked:
            said = torch.where((index == number).unsqueeze(-1), self.adapters[number](x), said)
        return factor.to(said.dtype).unsqueeze(-1) * said


def tap_for(passed: Passed) -> Any:
    """The hook on a layer's attention; no closure, so that a copied model has copied taps."""
    return partial(_tap, passed)


def _tap(passed: Passed, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    passed.call = kwargs.get(KEYWORD, passed.outer)
