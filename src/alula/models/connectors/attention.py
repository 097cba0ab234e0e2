"""Multi-head attention of queries over features, as the connectors here use it."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from alula.models.heads import head_dim


class QueryAttention(nn.Module):
    """Queries read features of the same width.

    Args:
        dim: width.
        num_heads: a divisor of `dim`.
        name: of the connector, for errors.

    Raises:
        UserError: `dim` is no multiple of `num_heads`.
    """

    def __init__(self, dim: int, *, num_heads: int, name: str) -> None:
        super().__init__()
        self.head_dim = head_dim(dim, num_heads=num_heads, kind=f"Connector '{name}'")
        self.queries, self.keys = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.values, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(
        self, queries: Float[Tensor, "images tokens dim"], keys: Float[Tensor, "images rows dim"], values: Float[Tensor, "images rows dim"]
    ) -> Float[Tensor, "images tokens dim"]:
        """What each query reads."""
        q, k, v = (
            linear(rows).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear, rows in ((self.queries, queries), (self.keys, keys), (self.values, values))
        )
        read = functional.scaled_dot_product_attention(q, k, v)
        return self.output(read.transpose(1, 2).flatten(2))
