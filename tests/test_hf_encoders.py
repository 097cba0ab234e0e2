"""Any vision model of Transformers is an encoder: rows where they are in the picture, without the tokens around them; or refused."""

import pytest
import torch
import transformers

from alula.errors import UserError
from alula.models.encoders import HfEncoder

VIT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2}
MAPS = {"hidden_sizes": [8] * 4, "depths": [1] * 4}
# the fields of a tiny one, the grid of its 64 pixels, and the tokens in front
TAKEN = {
    "Aimv2Vision": (VIT | {"is_native": True}, 4, 0),
    "AltCLIPVision": (VIT, 4, 1),
    "BlipVision": (VIT, 4, 1),
    "CLIPSegVision": (VIT, 4, 1),
    "CLIPVision": (VIT, 4, 1),
    "ConvNext": (MAPS | {"image_size": 64}, 2, 0),
    "DeiT": (VIT, 4, 2),
    "DINOv3ViT": (VIT | {"num_register_tokens": 4}, 4, 5),
    "Dinov2WithRegisters": (VIT, 4, 5),
    "FlavaImage": (VIT, 4, 1),
    "GitVision": (VIT, 4, 1),
    "InternVLVision": (VIT, 4, 1),
    "OwlViTVision": (VIT, 4, 1),
    "ResNet": ({"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}, 8, 0),
    "SmolVLMVision": (VIT, 4, 0),
    "Swin": (SWIN, 8, 0),
    "Yolos": (VIT | {"image_size": [64, 64], "num_detection_tokens": 5}, 4, 1),
}
REFUSED = {
    "BridgeTowerVision": (VIT, r"has no BridgeTowerVisionModel.*'bridgetower_vision_model'.*CLIPVisionConfig"),
    "PixtralVision": (VIT, r"makes \(1, 32, 16\) of 2 images.*4 x 4 = 16"),
    "ViTMAE": (VIT, r"makes \(2, 5, 16\) of 2 images of 64 x 64 pixels.*n x n rows: 2 x 2 = 4, 3 x 3 = 9"),
    "VideoMAE": (VIT, r"\(2, 3, 64, 64\) .*expected 5, got 4.*models that need pixel_values alone"),
    "XCLIPVision": (VIT, r"XCLIPVisionModel cannot take"),  # it mixes images: they are frames of one video
}


def configuration(name, fields):
    return getattr(transformers, f"{name}Config")(**fields).to_dict()


@pytest.mark.parametrize("name", TAKEN)
@torch.no_grad()
def test_rows_stand_where_they_are_in_the_picture_and_images_do_not_mix(name):
    fields, side, first = TAKEN[name]
    torch.manual_seed(0)
    encoder = HfEncoder(config=configuration(name, fields), image_size=64).eval()
    pixels = torch.randn(2, 3, 64, 64) * 0.1
    rows = encoder(pixels)
    assert (encoder.grid, encoder.first, rows.shape) == ((side, side), first, (2, side**2, encoder.output_dim))
    torch.testing.assert_close(encoder(pixels[1:]), rows[1:], atol=1e-4, rtol=1e-3)
    if name == "ResNet":
        return  # with fresh weights each cell sees much around it
    for row, column in ((0, side - 1), (side - 1, 0)):
        changed, size = pixels.clone(), 64 // side
        changed[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size] += 3.0
        assert (encoder(changed) - rows).norm(dim=-1).argmax(-1).tolist() == [row * side + column] * 2


@pytest.mark.parametrize("name", ["Aimv2Vision", "ConvNext", "DINOv3ViT", "InternVLVision", "Swin"])
def test_another_resolution_gives_another_grid(name):
    fields, side, _ = TAKEN[name]
    encoder = HfEncoder(config=configuration(name, fields), image_size=128, layer=-2)
    assert encoder(torch.zeros(1, 3, 128, 128)).shape == (1, encoder.num_tokens, encoder.output_dim)
    assert encoder.grid == {"ConvNext": (8, 8), "Swin": (16, 16)}.get(name, (2 * side, 2 * side))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_encoder_of_single_images_is_refused(name):
    fields, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        HfEncoder(config=configuration(name, fields))


def test_batch_norms_keep_their_statistics_in_training():
    encoder = HfEncoder(config=configuration("ResNet", TAKEN["ResNet"][0]), image_size=64).train()
    before = {name: value.clone() for name, value in encoder.named_buffers()}
    encoder(torch.randn(2, 3, 64, 64))
    assert before and all(torch.equal(value, before[name]) for name, value in encoder.named_buffers())
    with pytest.raises(UserError, match=r"names no single image_size\. Set image_size"):
        HfEncoder(config=configuration("ResNet", TAKEN["ResNet"][0]))
