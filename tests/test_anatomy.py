"""Where the parts are, in every architecture of the zoo; and the fingerprint that names a base model."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

from alula.errors import UserError
from alula.models import anatomy, base_fingerprint
from alula.models.anatomy import Anatomy
from zoo import EVERY, NO_TEXT_ONLY, build, example_batch
from zoo.parts import CLIP, TEXT

SHARE_NAMES_WITH_ENCODER = ("llava", "smolvlm", "internvl", "paligemma", "mllama")
PLACEHOLDERS = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"), "<|image_pad|>"),
    **dict.fromkeys(("internvl", "aya_vision"), "<IMG_CONTEXT>"),
    **dict.fromkeys(("gemma3", "gemma4"), "<image_soft_token>"),
    **dict.fromkeys(("mllama", "glm4v"), "<|image|>"),
    "ovis2": "<IMG_ATOM>",
}
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
zoo = pytest.mark.parametrize("name", EVERY)
built = cache(build)  # read only: tests that change a model build their own


class Wrapper(nn.Module):
    """Host and something new beside it, as a mixture has it."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host
        self.experts = nn.ModuleList([nn.Linear(4, 4, bias=False)])
        self.router = nn.Linear(4, 2)


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TEXT))


@zoo
def test_every_decoder_layer_is_found(name: str) -> None:
    model, _ = built(name)
    parts, config = anatomy(model), model.config.get_text_config(decoder=True)
    assert parts.num_layers == len(parts.attention) == config.num_hidden_layers
    assert parts.hidden_size == config.hidden_size
    for layer, attention in zip(parts.layers, parts.attention, strict=True):
        assert model.get_submodule(layer).get_submodule(attention.removeprefix(f"{layer}.")) is not None
    assert len(parts.mlp) == (0 if name in ("florence2", "blip_2") else parts.num_layers)
    assert model.get_submodule(parts.head) is model.get_output_embeddings()


@zoo
def test_layers_found_are_the_layers_that_run(name: str) -> None:
    model, processor = built(name)
    parts, order = anatomy(model), []
    hooks = [model.get_submodule(path).register_forward_hook(lambda *_, path=path: order.append(path)) for path in parts.layers]
    with torch.no_grad():
        model(**example_batch(name, processor))
    for hook in hooks:
        hook.remove()
    assert order == list(parts.layers)


@zoo
def test_default_linears_are_all_the_decoder_layers_and_nothing_else(name: str) -> None:
    model, _ = built(name)
    parts = anatomy(model)
    expected = {
        f"{layer}.{path}": module
        for layer in parts.layers
        for path, module in model.get_submodule(layer).named_modules()
        if isinstance(module, nn.Linear)
    }
    found = parts.linears(model)
    assert found == expected and len(found) >= (4 if name == "qwen3_vl_moe" else 6) * parts.num_layers
    assert all(parts.part_of(path) == "decoder" for path in found)
    assert all(model.get_submodule(path) is module for path, module in found.items())


@pytest.mark.parametrize("name", SHARE_NAMES_WITH_ENCODER)
def test_shared_names_hit_the_encoder_only_on_request(name: str) -> None:
    model, _ = built(name)
    parts = anatomy(model)
    inside = parts.linears(model, pattern=["q_proj", "v_proj"])
    seeing = parts.linears(model, part="encoder", pattern=["q_proj", "v_proj"])
    assert len(inside) == 2 * parts.num_layers and seeing
    assert not inside.keys() & seeing.keys()
    assert all(path.startswith(parts.encoder) for path in seeing)


@zoo
def test_parts_do_not_overlap_and_every_linear_has_one(name: str) -> None:
    model, _ = built(name)
    parts = anatomy(model)
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        is_text_encoder = name == "florence2" and path.startswith("model.language_model.encoder.")
        assert (parts.part_of(path) == "other") == is_text_encoder, path
    assert len(parts.encoder) == 1 and parts.connector
    assert parts.part_of(parts.encoder[0]) == "encoder" and parts.part_of(parts.connector[0]) == "connector"
    assert parts.head is not None and parts.part_of(parts.head) == "head"


@zoo
def test_image_mask_marks_the_models_placeholder(name: str) -> None:
    model, processor = built(name)
    batch = example_batch(name, processor)
    placeholder = processor.tokenizer.convert_tokens_to_ids(PLACEHOLDERS.get(name, "<image>"))
    mask = anatomy(model).image_mask(batch["input_ids"])
    assert torch.equal(mask, batch["input_ids"] == placeholder)
    assert mask.any(dim=1).all()
    if "mm_token_type_ids" in batch:
        assert torch.equal(mask, batch["mm_token_type_ids"] == 1)
    if name not in NO_TEXT_ONLY:
        text = example_batch(name, processor, text_only=True)
        assert not anatomy(model).image_mask(text["input_ids"]).any()


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("mllama", "blip_2", "florence2")])
def test_every_image_token_takes_one_feature(name: str) -> None:
    model, processor = built(name)
    batch = example_batch(name, processor)
    media = {key: value for key, value in batch.items() if key not in TEXT_INPUTS}
    with torch.no_grad():
        features = model.get_image_features(**media).pooler_output
    features = features if torch.is_tensor(features) else torch.cat(list(features))
    assert anatomy(model).image_mask(batch["input_ids"]).sum() == features.numel() // features.shape[-1]


@zoo
def test_images_matter_in_the_zoo(name: str) -> None:
    model, processor = built(name)
    one, other = (example_batch(name, processor, image_seed=seed) for seed in (0, 1))
    assert torch.equal(one["input_ids"], other["input_ids"])
    # BLIP-2's processor puts the image before the padding.
    assert one["attention_mask"][0, 4 if name == "blip_2" else 0] == 0, "the first sample is left-padded"
    with torch.no_grad():
        assert (model(**one).logits - model(**other).logits).abs().max() > 0.05


@zoo
def test_same_seed_builds_the_same_model(name: str) -> None:
    assert base_fingerprint(built(name)[0]) == base_fingerprint(build(name)[0]) != base_fingerprint(build(name, seed=1)[0])


def test_linears_can_be_chosen_by_expression_and_layer() -> None:
    model, _ = built("qwen2_vl")
    parts = anatomy(model)
    assert len(parts.linears(model, pattern=r"[qv]_proj")) == 8
    assert list(parts.linears(model, pattern=["down_proj"], layers=[-1])) == ["model.language_model.layers.3.mlp.down_proj"]
    assert parts.linears(model, layers=slice(2, None)).keys() == parts.linears(model, layers=[2, 3]).keys()


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ({"pattern": ["q_porj"]}, "called 'q_porj'. Known: down_proj, gate_proj.*Did you mean 'q_proj'"),
        ({"pattern": ["q_proj", "fc9"]}, "called 'fc9'"),
        ({"pattern": "proj"}, "called 'proj'"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": []}, "is chosen"),
        ({"layers": [0, 4]}, "no decoder layer 4. The layers are 0 to 3"),
        ({"part": "decode"}, "Did you mean 'decoder'"),
        ({"part": "encoder", "layers": [0]}, "in the decoder only"),
    ],
)
def test_a_choice_that_matches_nothing_is_refused_with_what_there_is(choice: dict, says: str) -> None:
    model, _ = built("qwen2_vl")
    with pytest.raises(UserError, match=says):
        anatomy(model).linears(model, **choice)


def test_hybrid_layers_are_known_by_the_attention_they_have() -> None:
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**TEXT, head_dim=16, layer_types=kinds))
    names = [path.rpartition(".")[2] for path in anatomy(model).attention]
    assert names == ["linear_attn"] * 3 + ["self_attn"]
    convolving = Lfm2ForCausalLM(Lfm2Config(**TEXT, layer_types=["conv", "full_attention"] * 2))
    assert [path.rpartition(".")[2] for path in anatomy(convolving).attention] == ["conv", "self_attn"] * 2


def test_text_only_model_has_no_image_tokens() -> None:
    parts = anatomy(llama())
    assert parts.encoder == parts.connector == () and parts.image_token_id is None
    assert not parts.image_mask(torch.arange(6).view(2, 3)).any()


def test_composed_model_has_the_same_anatomy(tmp_path: Path) -> None:
    from alula.models.composed import ComposedConfig, ComposedVLM

    encoder = {"name": "efficientnet_lite0", "image_size": 32}
    model = ComposedVLM(ComposedConfig(text_config=LlamaConfig(**TEXT), encoder_config=encoder, image_seq_length=1))
    parts = anatomy(model)
    assert parts.num_layers == 4 and parts.part_of(next(iter(parts.linears(model)))) == "decoder"
    assert (parts.encoder, parts.connector, parts.image_token_id) == (("vision_tower",), ("connector",), 4)
    assert parts.linears(model, part="connector")
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is ComposedVLM and base_fingerprint(again) == base_fingerprint(model)


@pytest.mark.parametrize(
    "make", [lambda: CLIPModel(CLIPConfig(vision_config=CLIP)), lambda: LlamaModel(LlamaConfig(**TEXT)), lambda: nn.Linear(2, 2)]
)
def test_a_model_without_text_generation_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(UserError, match=r"no decoder that generates text.*AutoModelForImageTextToText"):
        anatomy(make())


@pytest.mark.parametrize("name", ["llava", "mllama", "florence2", "qwen3_vl"])
def test_wrapped_linears_are_found_under_the_wrappers_path(name: str) -> None:
    model, _ = build(name)
    before = anatomy(model)
    linears = before.linears(model)
    for path, host in linears.items():
        model.set_submodule(path, Wrapper(host))
    after = anatomy(model)
    assert after == before
    assert after.linears(model) == linears


@pytest.mark.parametrize("depth", ["attention", "layers", "encoder"])
def test_wrapped_blocks_are_stepped_through(depth: str) -> None:
    model, _ = build("llava")
    before, fingerprint = anatomy(model), base_fingerprint(model)
    for path in getattr(before, depth):
        model.set_submodule(path, Wrapper(model.get_submodule(path)))
    after = anatomy(model)
    assert (after.layers, after.encoder, after.decoder) == (before.layers, before.encoder, before.decoder)
    found = after.linears(model)
    assert list(found.values()) == list(before_linears(before, model))
    assert all(model.get_submodule(path) is module for path, module in found.items())
    assert base_fingerprint(model) == fingerprint


def before_linears(parts: Anatomy, model: nn.Module) -> list[nn.Module]:
    """The decoder's linears without the wrappers' own, in order."""
    return [
        module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.startswith(parts.layers) and not {"experts", "router"} & set(path.split("."))
    ]


def test_peft_model_shows_its_base_models_parts() -> None:
    model, _ = build("llava")
    plain, fingerprint = anatomy(model).linears(model), base_fingerprint(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q|v)_proj"))
    parts = anatomy(wrapped)
    found = parts.linears(wrapped)
    assert [path.removeprefix("base_model.model.") for path in found] == list(plain)
    assert list(found.values()) == list(plain.values())
    assert base_fingerprint(wrapped) == base_fingerprint(model) == fingerprint


@zoo
def test_fingerprint_survives_saving_and_notices_one_changed_weight(name: str, tmp_path: Path) -> None:
    model, _ = build(name)
    fingerprint = base_fingerprint(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert base_fingerprint(again) == fingerprint
    next(iter(anatomy(again).linears(again).values())).weight.data[0, 0] += 1e-3
    assert base_fingerprint(again) != fingerprint


def test_fingerprint_ignores_wrappers_and_precision_but_not_heads() -> None:
    model = llama().bfloat16()
    fingerprint = base_fingerprint(model)
    assert base_fingerprint(model.float()) == fingerprint, "each bfloat16 is exact in float32"
    for path, host in anatomy(model).linears(model).items():
        model.set_submodule(path, Wrapper(Wrapper(host)))
    assert base_fingerprint(model) == fingerprint
    fewer_heads = LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 2}))
    assert base_fingerprint(fewer_heads) != base_fingerprint(llama())
