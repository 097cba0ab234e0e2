"""What routers look at: one hidden state, and what several of them need of it, computed once. It knows no router's rule."""

from collections.abc import Callable, Sequence
from functools import cached_property
from operator import attrgetter, is_
from typing import Any, Generic, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from alula.experts.choose import DECODE_SLOTS

T = TypeVar("T")
_TRAINS = attrgetter("requires_grad")


def _version(tensor: Tensor) -> int:
    """How often it was written to; tensors made in inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


class HasRows(Protocol):
    """A router that decides by the products of a token with some vectors."""

    joined: "Kept[Tensor]"

    def rows(self) -> Float[Tensor, "classes dim"]:
        """The vectors, in fp32."""


class Kept(Generic[T]):
    """Something computed from parameters that is made anew when one of them changed, and each time while one of them trains.

    A write through ``.data`` to a frozen parameter goes unseen, as torch counts none.

    Example:
        >>> weight, kept = nn.Parameter(torch.ones(2), requires_grad=False), Kept()
        >>> kept.of([weight], lambda: weight.sum().item()), kept.of([weight], lambda: "made anew")
        (2.0, 2.0)
        >>> _ = weight.add_(1)
        >>> kept.of([weight], lambda: "made anew")
        'made anew'
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._sources: Sequence[Tensor] = ()
        self._value: Any = None

    def __reduce__(self) -> tuple[type["Kept[T]"], tuple[()]]:  # a copy starts empty: its parameters are others
        return type(self), ()

    def of(self, sources: Sequence[Tensor], make: Callable[[], T]) -> T:
        """What `make` gives, or gave before."""
        if torch.is_grad_enabled() and any(map(_TRAINS, sources)):  # maps, not loops: asked for each expert, in each layer, for each token
            self.forget()
            return make()
        first = sources[0]
        key = (len(sources), sum(map(_version, sources)), first.device, first.dtype, torch.is_inference_mode_enabled())
        if key == self._key and all(map(is_, sources, self._sources)):
            return self._value
        self.forget()
        value = make()
        if not any(map(_TRAINS, sources)):
            self._key, self._value, self._sources = key, value, tuple(sources)
        return value

    def forget(self) -> None:
        """Drops what was kept."""
        self._key, self._value, self._sources = None, None, ()


class Seen:
    """One hidden state.

    Args:
        x: batch x tokens x dim.
        together: routers that look at it; their rows are multiplied with it in one product.
    """

    def __init__(self, x: Float[Tensor, "batch tokens dim"], *, together: Sequence[HasRows] = ()) -> None:
        self.x = x
        self._together = together
        self._products: dict[int, Tensor] = {}

    @cached_property
    def fp32(self) -> Float[Tensor, "batch tokens dim"]:
        """The hidden state in the precision of routing."""
        return self.x.float()

    @cached_property
    def inverse_spread(self) -> Float[Tensor, "batch tokens 1"]:
        """One over the standard deviation of each token, as in LayerNorm; without a pass that writes the hidden state."""
        if not torch.is_grad_enabled() and self.x.shape[0] * self.x.shape[1] <= DECODE_SLOTS:  # one call instead of nine
            return torch.native_layer_norm(self.fp32, self.x.shape[-1:], None, None, 1e-5)[2]
        square = torch.linalg.vecdot(self.fp32, self.fp32).unsqueeze(-1) / self.x.shape[-1]
        variance = square - self.fp32.mean(dim=-1, keepdim=True).square()
        return torch.rsqrt(variance.clamp(min=0) + 1e-5)

    def products(self, router: HasRows) -> Float[Tensor, "batch tokens classes"]:
        """``x . row`` for each of the router's rows."""
        if id(router) not in self._products:
            group = self._together if any(router is other for other in self._together) else (router,)
            parts = nn.functional.linear(self.fp32, joined_rows(group)).split([len(other.rows()) for other in group], dim=-1)
            self._products = dict(zip(map(id, group), parts, strict=True))
        return self._products[id(router)]


def joined_rows(routers: Sequence[HasRows]) -> Float[Tensor, "classes dim"]:
    """The rows of all of them, one after the other."""
    rows = [router.rows() for router in routers]
    return routers[0].joined.of(rows, lambda: torch.cat(rows)) if len(rows) > 1 else rows[0]
