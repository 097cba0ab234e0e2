"""The adaptive deformable transformation: a fixed number of queries that choose where to look."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization

from alula.errors import UserError
from alula.models.connectors.attention import QueryAttention
from alula.models.connectors.base import CONNECTORS, Connector, square_side
from alula.models.heads import head_dim

Sizes = Int[Tensor, "images 2"]


class DeformableAttention(nn.Module):
    """Each query reads a map at `num_points` places a head: its reference point plus offsets that it chooses.

    Source: Shen et al., "MoME", equations 2 to 5, https://arxiv.org/abs/2407.12709; the softmax over points and the initialisation
    are Deformable-DETR's, https://arxiv.org/abs/2010.04159.

    Args:
        dim: width of queries and map.
        num_tokens: queries, a square.
        grid: rows and columns of the map.
        is_scaled: offsets are in cells of the map, as in Deformable-DETR; else in shares of the map, as equation 2 has it.
    """

    def __init__(
        self, dim: int, *, num_tokens: int, grid: tuple[int, int], num_heads: int = 8, num_points: int = 4, is_scaled: bool = False
    ) -> None:
        super().__init__()
        head_dim(dim, num_heads=num_heads, kind="Connector 'deformable'")
        self.side = square_side(num_tokens, name="deformable")
        self.grid, self.num_heads, self.num_points, self.is_scaled = grid, num_heads, num_points, is_scaled
        self.reference = nn.Parameter(torch.empty(num_tokens, 2))
        self.offsets = nn.Linear(dim, num_heads * num_points * 2)
        self.weights = nn.Linear(dim, num_heads * num_points)
        self.values, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reference points on a grid, offsets in a ring that grows by one cell a point, uniform weights, Xavier values."""
        middles = (torch.arange(self.side) + 0.5) / self.side
        points = torch.stack(torch.meshgrid(middles, middles, indexing="xy"), -1).view(-1, 2)
        initialization.copy_(self.reference, points)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        ring = torch.stack([angles.cos(), angles.sin()], -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)
        ring = ring[:, None] * (torch.arange(self.num_points) + 1.0)[None, :, None]
        cells = ring if self.is_scaled else ring / torch.tensor([self.grid[1], self.grid[0]])
        initialization.copy_(self.offsets.bias, cells.flatten())
        for parameter in (self.offsets.weight, self.weights.weight, self.weights.bias, self.values.bias, self.output.bias):
            nn.init.zeros_(parameter)
        nn.init.xavier_uniform_(self.values.weight)
        nn.init.xavier_uniform_(self.output.weight)

    def forward(
        self, queries: Float[Tensor, "images tokens dim"], maps: Float[Tensor, "images rows columns dim"], sizes: Sizes
    ) -> Float[Tensor, "images tokens dim"]:
        """What each query read. Places, weights and sampling are in float32.

        Args:
            sizes: rows and columns of each image's map; what is to the right and below is padding.
        """
        heads, points = self.num_heads, self.num_points
        places = self.places(queries, sizes)
        # Outside its map an image reads zeros, as grid_sample does it; `values` has a bias, so padding must be emptied after it.
        values = self.values(maps) * _inside(sizes, maps)
        values = values.float().unflatten(-1, (heads, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)
        extent = sizes.flip(-1) / torch.tensor([maps.shape[2], maps.shape[1]], device=maps.device)
        places = places * extent[:, None, None, None] * 2 - 1
        read = functional.grid_sample(values, places.permute(0, 2, 1, 3, 4).flatten(0, 1), mode="bilinear", align_corners=False)
        weights = self.weights(queries).float().unflatten(-1, (heads, points)).softmax(-1)
        read = (read * weights.permute(0, 2, 1, 3).flatten(0, 1).unsqueeze(1)).sum(-1)
        return self.output(read.unflatten(0, (-1, heads)).permute(0, 3, 1, 2).flatten(2).to(queries.dtype))

    def places(self, queries: Float[Tensor, "images tokens dim"], sizes: Sizes) -> Float[Tensor, "images tokens heads points 2"]:
        """Where each query looks, (x, y) as shares of its image's map."""
        offsets = self.offsets(queries).float().unflatten(-1, (self.num_heads, self.num_points, 2))
        if self.is_scaled:
            offsets = offsets / sizes.flip(-1)[:, None, None, None]
        return self.reference.float()[None, :, None, None] + offsets


class DeformableLayer(nn.Module):
    """Self-attention of the queries, deformable attention, feed-forward network; each after a LayerNorm, with a shortcut."""

    def __init__(self, attention: DeformableAttention, *, dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_norm, self.cross_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attention = QueryAttention(dim, num_heads=num_heads, name="deformable")
        self.cross_attention = attention
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(
        self, queries: Float[Tensor, "images tokens dim"], maps: Float[Tensor, "images rows columns dim"], sizes: Sizes
    ) -> Float[Tensor, "images tokens dim"]:
        """The queries of the next layer."""
        rows = self.self_norm(queries)
        queries = queries + self.self_attention(rows, rows, rows)
        queries = queries + self.cross_attention(self.cross_norm(queries), maps, sizes)
        return queries + self.mlp(self.mlp_norm(queries))


@CONNECTORS.register("deformable")
class DeformableConnector(Connector):
    """The adaptive deformable transformation (ADT), then one linear layer to the backbone's width.

    Source: Shen et al., "MoME: Mixture of Multimodal Experts for Generalist Multimodal Large Language Models", equations 1 to 5,
    https://arxiv.org/abs/2407.12709. The paper leaves open and ours are: 256 tokens, the norm before each part and before the linear
    layer, a feed-forward width of 4 x, and the linear layer itself, without which encoders of several widths cannot be added up.

    Args:
        input_dim: width of the encoder's features and of the queries.
        output_dim: width of the backbone.
        grid: rows and columns of the encoder's patches.
        num_tokens: a square; may be more than there are patches.
        num_layers: 6 in the paper.
        num_heads: a divisor of `input_dim`.
        num_points: places a head looks at.
        is_scaled: see `DeformableAttention`.

    Raises:
        UserError: `num_tokens` is no square, or `input_dim` no multiple of `num_heads`.

    Example:
        >>> import torch
        >>> DeformableConnector(16, 4, grid=(4, 6), num_tokens=9, num_layers=1)(torch.zeros(2, 24, 16)).shape
        torch.Size([2, 9, 4])
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *,
        grid: tuple[int, int],
        num_tokens: int = 256,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        is_scaled: bool = False,
    ) -> None:
        super().__init__()
        self.side = square_side(num_tokens, name="deformable")
        self.num_tokens, self.grid = num_tokens, grid
        options = {"num_heads": num_heads, "num_points": num_points, "is_scaled": is_scaled}
        self.layers = nn.ModuleList(
            DeformableLayer(
                DeformableAttention(input_dim, num_tokens=num_tokens, grid=grid, **options),  # type: ignore[arg-type]
                dim=input_dim,
                num_heads=num_heads,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(input_dim)
        self.projection = nn.Linear(input_dim, output_dim)

    def reset_parameters(self) -> None:
        """The deformable attentions as they set out."""
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()

    def forward(
        self, features: Float[Tensor, "images patches features"], *, sizes: Sizes | None = None
    ) -> Float[Tensor, "images tokens dim"]:
        """The projected tokens.

        Args:
            sizes: rows and columns of each image's own map where maps of several sizes share a batch, each padded to the right and
                below to `grid`; None is `grid` for all.

        Raises:
            UserError: a size is not between 1 x 1 and `grid`.
        """
        maps = features.unflatten(1, self.grid)
        whole = torch.tensor(self.grid, device=features.device)
        given = whole.expand(len(features), 2) if sizes is None else sizes
        if sizes is not None and not bool(((sizes >= 1) & (sizes <= whole)).all()):
            raise UserError(f"Maps of sizes {sizes.tolist()} came. Each is 1 x 1 to {self.grid[0]} x {self.grid[1]}. Correct `sizes`.")
        queries = _pooled(maps, given, self.side)
        for layer in self.layers:
            queries = layer(queries, maps, given)
        return self.projection(self.norm(queries))


def _inside(sizes: Sizes, maps: Float[Tensor, "images rows columns dim"]) -> Float[Tensor, "images rows columns 1"]:
    """1 where an image's own map is, 0 on padding."""
    rows = torch.arange(maps.shape[1], device=maps.device) < sizes[:, :1]
    columns = torch.arange(maps.shape[2], device=maps.device) < sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None]).unsqueeze(-1).to(maps.dtype)


def _pooled(maps: Float[Tensor, "images rows columns dim"], sizes: Sizes, side: int) -> Float[Tensor, "images tokens dim"]:
    """What `adaptive_avg_pool2d` makes of each image's own map."""
    rows, columns = (_cells(sizes[:, axis], side=side, length=maps.shape[axis + 1]).to(maps.dtype) for axis in (0, 1))
    return torch.einsum("iar,ibc,ircd->iabd", rows, columns, maps).flatten(1, 2)


def _cells(lengths: Int[Tensor, " images"], *, side: int, length: int) -> Float[Tensor, "images cells positions"]:
    """Row i weighs the positions from floor(i n / side) to ceil((i + 1) n / side) alike, n being that image's length."""
    index, positions = torch.arange(side, device=lengths.device), torch.arange(length, device=lengths.device)
    start = index * lengths[:, None] // side
    end = -(-(index + 1) * lengths[:, None] // side)
    inside = (positions >= start[..., None]) & (positions < end[..., None])
    return inside / (end - start)[..., None]
