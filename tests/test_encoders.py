"""Encoders: rows in reading order, positions at other resolutions, and who may read whom."""

import pytest
import torch
from torch.nn import functional
from transformers import Aimv2VisionConfig, CLIPVisionConfig, Dinov2Config, SiglipVisionConfig, ViTConfig

from alula.errors import UserError
from alula.models.encoders import ENCODERS, HfEncoder, PatchEncoder, VitEncoder

SMALL = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
TINY = {
    "efficientnet_lite0": {"image_size": 64},
    "hf": {"config": CLIPVisionConfig(**SMALL).to_dict(), "image_size": 32},
    "patch": {"image_size": 64, "patch_size": (32, 16), "dim": 12, "num_layers": 1},
    "vit": {"image_size": 64, "patch_size": 16, "dim": 12, "num_layers": 1},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gives_one_row_for_each_cell_of_its_grid(name: str) -> None:
    encoder = ENCODERS[name](**TINY[name])
    rows, columns = encoder.grid
    found = encoder(torch.randn(2, 3, encoder.image_size, encoder.image_size))
    assert found.shape == (2, rows * columns, encoder.output_dim)
    assert encoder.num_tokens == rows * columns


@pytest.mark.parametrize("kind", [CLIPVisionConfig, SiglipVisionConfig, ViTConfig, Dinov2Config], ids=lambda kind: kind.model_type)
@torch.no_grad()
def test_positions_are_interpolated_at_another_resolution(kind: type) -> None:
    config = kind(**SMALL).to_dict()
    encoder, native = HfEncoder(config=config, image_size=32).eval(), HfEncoder(config=config).eval()
    native.load_state_dict(encoder.state_dict())  # the weights are those of the configuration's resolution
    assert (native.grid, encoder.grid) == ((2, 2), (4, 4))
    large, small = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 16, 16)
    assert encoder(large).shape == (1, 16, 12)
    # On an empty image features are positions: interpolated ones differ from each other, and are not those of the small image.
    assert encoder(large)[0].unique(dim=0).shape[0] == 16
    assert native(small).shape == (1, 4, 12)


def test_an_unknown_position_scheme_at_another_resolution_is_refused_with_the_arithmetic() -> None:
    config = Aimv2VisionConfig(**SMALL | {"hidden_size": 16}).to_dict()
    assert HfEncoder(config=config).grid == (2, 2)
    with pytest.raises(UserError, match=r"16 / 8 = 2, 2 x 2 = 4 positions. image_size=32 needs 4 x 4 = 16.*Set image_size=16"):
        HfEncoder(config=config, image_size=32)
    with pytest.raises(UserError, match=r"image_size=30 with patches of 8 pixels: 30 = 3 x 8 \+ 6.*Set image_size=24 or 32"):
        HfEncoder(config=CLIPVisionConfig(**SMALL).to_dict(), image_size=30)


@torch.no_grad()
def test_the_vit_reads_what_its_mask_allows() -> None:
    encoder = VitEncoder(image_size=32, patch_size=8, dim=12, num_layers=2).eval()
    pixels = torch.randn(2, 3, 32, 32)
    everything = torch.ones(2, 16, 16, dtype=torch.bool)
    torch.testing.assert_close(encoder(pixels, mask=everything), encoder(pixels))
    index = torch.arange(16)
    prefix = torch.tensor([3, 7])[:, None, None]
    mask = (index < prefix) | (index <= index[:, None])  # AIM: inside the prefix everything, then only what came before
    before = encoder(pixels, mask=mask)
    assert not torch.allclose(before, encoder(pixels))
    changed = pixels.clone()
    changed[:, :, 16:24, 16:24] += 1.0  # patch 2 * 4 + 2 = 10
    after = encoder(changed, mask=mask)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.isclose(before[:, 10:], after[:, 10:]).all(-1).any()


@torch.no_grad()
def test_the_vits_positions_follow_the_resolution() -> None:
    small = VitEncoder(image_size=32, patch_size=8, dim=12, num_layers=1).eval()
    large = VitEncoder(image_size=64, trained_size=32, patch_size=8, dim=12, num_layers=1).eval()
    large.load_state_dict(small.state_dict())
    table = small.model.embeddings.position_embedding.weight
    expected = functional.interpolate(table.T.view(1, 12, 4, 4), (8, 8), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    seen: list[torch.Tensor] = []
    large.model.embeddings.register_forward_hook(lambda module, inputs, output: seen.append(output))
    large(torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(seen[0] - large.model.embeddings.patch_embedding.bias, expected)


@torch.no_grad()
def test_the_patch_encoder_embeds_each_patch_with_its_row_and_column() -> None:
    encoder = PatchEncoder(image_size=32, patch_size=(16, 8), dim=12, num_layers=1).eval()
    pixels = torch.rand(2, 3, 32, 32)
    rows = []
    for image in pixels:
        image = (image - image.mean()) / image.std()
        for r in range(2):
            for c in range(4):
                cut = image[:, 16 * r : 16 * r + 16, 8 * c : 8 * c + 8].reshape(-1)
                rows.append(encoder.embedding(cut) + encoder.rows[r, 0] + encoder.columns[0, c])
    torch.testing.assert_close(encoder(pixels), encoder.blocks(torch.stack(rows).view(2, 8, 12)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder(pixels * 0.5 + 3), encoder(pixels), atol=1e-4, rtol=1e-3)  # light and contrast do not matter
    assert encoder(torch.full((1, 3, 32, 32), 0.7)).isfinite().all()


@torch.no_grad()
def test_rows_and_columns_of_the_patch_encoder_follow_the_resolution() -> None:
    small = PatchEncoder(image_size=32, patch_size=(16, 8), dim=12, num_layers=1).eval()
    large = PatchEncoder(image_size=64, trained_size=32, patch_size=(16, 8), dim=12, num_layers=1).eval()
    large.load_state_dict(small.state_dict())
    first, second = small.rows[:, 0]
    rows = torch.stack([first, 0.75 * first + 0.25 * second, 0.25 * first + 0.75 * second, second])  # halves of what is half as high
    seen: list[torch.Tensor] = []
    large.blocks.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].view(4, 8, 12)))
    large(torch.zeros(1, 3, 64, 64))
    torch.testing.assert_close(seen[0][:, :1] - seen[0][:1, :1], (rows - rows[0]).unsqueeze(1))
    with pytest.raises(UserError, match=r"trained_size=63 with patches of 16 pixels.*Set trained_size=48 or 64"):
        PatchEncoder(image_size=64, trained_size=63, patch_size=(16, 8), dim=12, num_layers=1)
    assert large.grid == (4, 8) and not torch.equal(seen[0][0, 1], seen[0][0, 2])
