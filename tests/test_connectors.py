"""Connectors: each is what its paper's equations say, on grids that are no squares."""

import math

import pytest
import torch
from torch.nn import functional

from alula.errors import UserError
from alula.files import read_tensors
from alula.models.connectors import CONNECTORS, AveragePoolConnector, CAbstractorConnector, DeformableConnector, MlpConnector
from alula.models.connectors.attention_pool import AttentionPoolConnector
from alula.models.connectors.deformable import DeformableAttention
from alula.models.smol import CONNECTOR_FILE

OPTIONS = {
    "attention_pool": {"num_tokens": 5, "num_heads": 2},
    "average_pool": {"num_tokens": 9},
    "c_abstractor": {"num_tokens": 9, "hidden_dim": 12, "depth": 2},
    "deformable": {"num_tokens": 16, "num_layers": 2, "num_heads": 2},
}
GRID = (3, 5)


@pytest.mark.parametrize("name", CONNECTORS)
def test_a_connector_gives_its_tokens_from_any_grid_and_all_of_it_learns(name: str) -> None:
    connector = CONNECTORS[name](8, 6, grid=GRID, **OPTIONS.get(name, {}))
    tokens = connector(torch.randn(2, 15, 8))
    assert tokens.shape == (2, connector.num_tokens, 6)
    assert connector.num_tokens == OPTIONS.get(name, {}).get("num_tokens", 15)
    tokens.square().sum().backward()
    # Uniform weights over points that all start the same give the points' weights no gradient only if the map is flat; this one is not.
    assert [path for path, value in connector.named_parameters() if value.grad is None] == []


def test_the_shipped_connector_of_smol_still_loads() -> None:
    shipped = read_tensors(CONNECTOR_FILE)
    connector = MlpConnector(1280, 576, grid=(4, 4))
    connector.load_state_dict(shipped)
    assert connector.num_tokens == 16


def test_average_pooling_is_the_mean_of_each_cell() -> None:
    connector = AveragePoolConnector(8, 6, grid=(4, 6), num_tokens=4)
    features = torch.randn(2, 24, 8)
    cells = features.view(2, 4, 6, 8)
    means = [cells[:, r : r + 2, c : c + 3].mean((1, 2)) for r in (0, 2) for c in (0, 3)]
    torch.testing.assert_close(connector(features), connector.projection(torch.stack(means, 1)))


def test_attention_pooling_is_softmax_attention_head_by_head() -> None:
    connector = AttentionPoolConnector(8, 6, grid=GRID, num_tokens=5, num_heads=2)
    features = torch.randn(1, 15, 8)
    rows, attention = connector.norm(features)[0], connector.attention
    q, k, v = attention.queries(connector.queries), attention.keys(rows + connector.positions), attention.values(rows)
    heads = [torch.softmax(q[:, s] @ k[:, s].T / math.sqrt(4), -1) @ v[:, s] for s in (slice(0, 4), slice(4, 8))]
    torch.testing.assert_close(connector(features)[0], connector.projection(attention.output(torch.cat(heads, -1))))


def reference_block(w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The block as the specification writes it, with functions only."""

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        y = y.permute(0, 2, 3, 1)
        return functional.layer_norm(y, y.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5).permute(0, 3, 1, 2)

    y = functional.silu(norm(functional.conv2d(x, w["widen.weight"]), "widen_norm"))
    channels = y.shape[1]
    y = functional.silu(norm(functional.conv2d(y, w["depthwise.weight"], padding=1, groups=channels), "depthwise_norm"))
    squeezed = functional.silu(functional.conv2d(y.mean((2, 3), keepdim=True), w["squeeze.weight"], w["squeeze.bias"]))
    y = y * functional.conv2d(squeezed, w["excite.weight"], w["excite.bias"]).sigmoid()
    short = norm(functional.conv2d(x, w["shortcut.0.weight"]), "shortcut.1") if "shortcut.0.weight" in w else x
    return functional.silu(norm(functional.conv2d(y, w["project.weight"]), "project_norm") + short)


def test_the_c_abstractor_is_what_the_specification_says() -> None:
    connector = CAbstractorConnector(8, 6, grid=(4, 6), num_tokens=4, hidden_dim=12, depth=2)
    features = torch.randn(2, 24, 8)
    maps = (features + connector.positions).transpose(1, 2).view(2, 8, 4, 6)
    for block in connector.before:
        maps = reference_block(block.state_dict(), maps)
    maps = functional.avg_pool2d(maps, (2, 3))
    for block in connector.after:
        maps = reference_block(block.state_dict(), maps)
    tokens = connector.outer(functional.silu(connector.inner(maps.flatten(2).transpose(1, 2))))
    torch.testing.assert_close(connector(features), tokens)


def test_the_c_abstractor_of_mm1_has_27_6_million_parameters() -> None:
    with torch.device("meta"):
        connector = CAbstractorConnector(1280, 2560, grid=(27, 27), num_tokens=144)
    assert round(sum(value.numel() for value in connector.parameters()) / 1e6, 1) == 27.6


def test_bad_sizes_are_refused_with_the_arithmetic() -> None:
    with pytest.raises(UserError, match=r"num_tokens=50, which is no square: 7 x 7 = 49, 8 x 8 = 64.*Set num_tokens=49 or 64"):
        CAbstractorConnector(8, 6, grid=(9, 9), num_tokens=50)
    with pytest.raises(UserError, match=r"num_tokens=16 = 4 x 4, but the encoder gives 3 x 5 patches.*Set num_tokens=9"):
        AveragePoolConnector(8, 6, grid=GRID, num_tokens=16)
    with pytest.raises(UserError, match=r"num_heads=3 for features 8 wide: 8 / 3"):
        DeformableConnector(8, 6, grid=GRID, num_tokens=4, num_heads=3)


def bilinear(maps: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The value of a (rows, columns, dim) map at (x, y), shares of its width and height; zero outside."""
    rows, columns, dim = maps.shape
    column, row = x * columns - 0.5, y * rows - 0.5
    total = torch.zeros(dim)
    for r in (math.floor(row), math.floor(row) + 1):
        for c in (math.floor(column), math.floor(column) + 1):
            if 0 <= r < rows and 0 <= c < columns:
                total = total + maps[r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return total


def shaken(attention: DeformableAttention) -> DeformableAttention:
    """With weights that are not those at birth, so that every equation matters."""
    with torch.no_grad():
        for value in attention.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return attention


@pytest.mark.parametrize("is_scaled", [False, True])
@torch.no_grad()
def test_deformable_attention_equals_a_loop_over_queries_heads_and_points(is_scaled: bool) -> None:
    attention = shaken(DeformableAttention(8, num_tokens=4, grid=GRID, num_heads=2, num_points=3, is_scaled=is_scaled))
    queries, maps = torch.randn(2, 4, 8), torch.randn(2, *GRID, 8)
    expected = torch.zeros(2, 4, 8)
    for image in range(2):
        values = attention.values(maps[image])
        for i in range(4):
            offsets = attention.offsets(queries[image, i]).view(2, 3, 2)
            if is_scaled:
                offsets = offsets / torch.tensor([GRID[1], GRID[0]])
            weights = attention.weights(queries[image, i]).view(2, 3).softmax(-1)
            for j in range(2):
                part = values[..., 4 * j : 4 * j + 4]
                for k in range(3):
                    x, y = attention.reference[i] + offsets[j, k]
                    expected[image, i, 4 * j : 4 * j + 4] += weights[j, k] * bilinear(part, x, y)
    found = attention(queries, maps, torch.tensor([GRID, GRID]))
    torch.testing.assert_close(found, attention.output(expected), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_without_offsets_and_with_uniform_weights_it_samples_at_the_reference_points() -> None:
    attention = DeformableAttention(8, num_tokens=4, grid=GRID, num_heads=2)
    attention.offsets.bias.zero_()
    maps = torch.randn(1, *GRID, 8)
    sampled = torch.stack([bilinear(attention.values(maps[0]), x, y) for x, y in attention.reference])
    assert attention.reference.tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    found = attention(torch.randn(1, 4, 8), maps, torch.tensor([GRID]))
    torch.testing.assert_close(found[0], attention.output(sampled), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_offsets_set_out_as_a_ring_of_cells_in_either_unit() -> None:
    sizes, queries = torch.tensor([GRID]), torch.zeros(1, 4, 8)
    places = [DeformableAttention(8, num_tokens=4, grid=GRID, is_scaled=one).places(queries, sizes) for one in (False, True)]
    torch.testing.assert_close(*places)
    first = (places[0][0, 0, 0] - torch.tensor([0.25, 0.25])) * torch.tensor([5.0, 3.0])
    torch.testing.assert_close(first, torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]]))


@torch.no_grad()
def test_maps_of_several_sizes_share_a_batch_and_padding_changes_nothing() -> None:
    connector = DeformableConnector(8, 6, grid=(4, 6), num_tokens=9, num_layers=2, num_heads=2)
    for layer in connector.layers:
        shaken(layer.cross_attention)
    sizes = torch.tensor([[4, 6], [3, 5], [1, 2]])
    maps = torch.randn(3, 4, 6, 8)
    batch = connector(maps.flatten(1, 2), sizes=sizes)
    for i, (rows, columns) in enumerate(sizes.tolist()):
        own = maps[i : i + 1, :rows, :columns]
        alone = DeformableConnector(8, 6, grid=(rows, columns), num_tokens=9, num_layers=2, num_heads=2)
        alone.load_state_dict(connector.state_dict())
        torch.testing.assert_close(batch[i], alone(own.flatten(1, 2))[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(batch[:1], connector(maps[:1].flatten(1, 2), sizes=sizes[:1]))
    with pytest.raises(UserError, match=r"Each is 1 x 1 to 4 x 6"):
        connector(maps.flatten(1, 2), sizes=sizes + 3)


@torch.no_grad()
def test_the_first_queries_are_an_adaptive_average_pooling() -> None:
    connector = DeformableConnector(8, 8, grid=GRID, num_tokens=16, num_layers=0)
    connector.norm, connector.projection = torch.nn.Identity(), torch.nn.Identity()
    features = torch.randn(2, 15, 8)
    pooled = functional.adaptive_avg_pool2d(features.transpose(1, 2).view(2, 8, *GRID), 4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(connector(features), pooled)
