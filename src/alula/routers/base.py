"""What a token-level router is: hidden states in, weights over experts out. It knows nothing of hosts."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from alula.context import Context
from alula.errors import UserError
from alula.experts import Chosen, LoRAExperts
from alula.registry import Registry
from alula.routers.groups import Groups
from alula.routers.seen import Kept, Seen


class Router(nn.Module, ABC):
    """Weights over the experts of one site, decided for each token.

    Attributes:
        names: the experts it knows, in order.
        is_shared: one router serves all linears of a block (attention or MLP); else each linear has its own.
        needs_training: its parameters are learnt in a stage after the expert's.
    """

    is_shared: bool = False
    needs_training: bool = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.names: list[str] = []
        self.joined: Kept[Tensor] = Kept()
        self._groups: Kept[Groups] = Kept()

    @abstractmethod
    def grow(self, name: str, experts: LoRAExperts) -> None:
        """Makes room for an expert that was just added."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Forgets an expert."""

    @abstractmethod
    def choose(self, seen: Seen, context: Context) -> Chosen:
        """fp32 weights of the experts that speak; what they miss to 1 goes to the base model."""

    def rows(self) -> Float[Tensor, "classes dim"]:
        """The vectors whose products with a token decide, for routers that ask `Seen.products`: siblings' are computed together."""
        raise NotImplementedError(f"{type(self).__name__} has no rows")

    def best(
        self,
        seen: Seen,
        context: Context,
        to_scores: Callable[[Float[Tensor, "batch tokens some"]], Float[Tensor, "batch tokens some"]],
        *,
        products: Callable[[], Float[Tensor, "batch tokens classes"]] | None = None,
        either_sign: bool = False,
    ) -> Chosen:
        """`pick` among the products with `rows`, or among those of the best groups of rows if the routing says so.

        Args:
            products: what is picked from, if not the products as they are.

        Raises:
            UserError: groups asked for where every expert must be compared.
        """
        routing, prior = context.routing, prior_of(context, seen.x)
        options = {"top_k": routing.top_k, "experts": len(self.names)}
        if not routing.groups:
            found = seen.products(self) if products is None else products()
            if prior is not None:
                prior = functional.pad(prior, (0, found.shape[-1] - prior.shape[-1]))
            return pick(found, to_scores, **options, prior=prior, either_sign=either_sign)
        if prior is not None or routing.null in ("zero_expert", "threshold"):
            raise UserError(
                f"groups: {routing.groups} came with level '{routing.level}' and null '{routing.null}', which compare every expert. "
                "Groups go with level 'token' and null 'none' or 'sigmoid_keep': set these, or groups to 0."
            )
        rows = self.rows()
        groups = self._groups.of([rows], lambda: Groups(rows, either_sign=either_sign))
        best, index = groups.best(seen.fp32, top_k=routing.top_k, groups=routing.groups)
        return Chosen(weights=to_scores(best).softmax(dim=-1), index=index.clamp(max=len(self.names)), experts=len(self.names))

    def forward(self, x: Float[Tensor, "batch tokens dim"], context: Context) -> Float[Tensor, "batch tokens experts"]:
        """fp32 weights over all experts."""
        return self.choose(Seen(x), context).dense()

    def refresh(self, experts: LoRAExperts) -> None:
        """Recomputes what depends on the experts' tensors, once they are trained. Optional."""

    @abstractmethod
    def stored(self, name: str) -> dict[str, Tensor]:
        """What must be kept of one expert to route to it again."""

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that `stored` can give. Optional: of those that it gives now."""
        return {key: tuple(tensor.shape) for key, tensor in self.stored(name).items()}

    @abstractmethod
    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Takes back what `stored` gave; names and shapes are those of `shapes`."""


ROUTERS: Registry[type[Router]] = Registry("router")


def pick(
    products: Float[Tensor, "batch tokens classes"],
    to_scores: Callable[[Float[Tensor, "batch tokens some"]], Float[Tensor, "batch tokens some"]],
    *,
    top_k: int,
    experts: int,
    prior: Float[Tensor, "batch _ classes"] | None = None,
    either_sign: bool = False,
) -> Chosen:
    """The `top_k` best classes and the softmax of their scores; nothing as wide as all classes is kept for backward.

    Args:
        to_scores: rises with a token's product (with `either_sign`: with its size), so that only the best are computed.
        experts: classes from this one on are the base model.
        prior: added to the scores; then all of them are computed.
    """
    count = min(top_k, products.shape[-1])
    if count == experts == products.shape[-1]:  # nobody is left out: nobody need be sorted, and slot i is expert i
        scores = to_scores(products) if prior is None else to_scores(products) + prior
        return Chosen(weights=scores.softmax(dim=-1), experts=experts)
    if prior is not None:
        best, index = (to_scores(products) + prior).topk(count, dim=-1)
        return Chosen(weights=best.softmax(dim=-1), index=index, experts=experts)
    if either_sign:
        index = products.detach().abs().topk(count, dim=-1).indices
        best = products.gather(-1, index)
    else:
        best, index = products.topk(count, dim=-1)
    return Chosen(weights=to_scores(best).softmax(dim=-1), index=index, experts=experts)


def standardise(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """LayerNorm without affine, in fp32."""
    return nn.functional.layer_norm(x.float(), x.shape[-1:])


def centred(rows: Float[Tensor, "classes dim"]) -> Float[Tensor, "classes dim"]:
    """Rows that give, on a token as it is, what `rows` give on the token less its mean."""
    return rows - rows.mean(dim=-1, keepdim=True)


def prior_of(context: Context, x: Tensor) -> Float[Tensor, "rows 1 classes"] | None:
    """The sample's log-weights, at level ``combined``."""
    return None if context.prior is None else context.per_row(context.prior, x)


def scaled(scores: Tensor, factor: float | None) -> Tensor:
    """`scores` times a factor, where there is one to speak of."""
    return scores if factor is None or factor == 1.0 else scores * factor
