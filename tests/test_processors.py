"""Processors and models by name, on a machine without torchvision."""

import json
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch

from alula.errors import UserError
from alula.models import load_model, load_processor
from alula.models.processors import MissingVideo
from zoo import BUILDERS, build, example_batch

WITH_VIDEO = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "smolvlm", "internvl")
built = cache(build)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("name", BUILDERS)
def test_saved_processor_gives_the_same_batches(name: str, tmp_path: Path) -> None:
    _, processor = built(name)
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert type(again).__name__ == type(processor).__name__
    assert again.chat_template == processor.chat_template
    assert_same(example_batch(name, processor, batch=3), example_batch(name, again, batch=3))
    assert again.to_dict() == processor.to_dict()


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_saving_keeps_the_video_entry(name: str, tmp_path: Path) -> None:
    _, processor = built(name)
    processor.save_pretrained(tmp_path / "first")
    written = json.loads((tmp_path / "first" / "processor_config.json").read_text())
    # What a machine with torchvision would have written.
    written["video_processor"] |= {"do_resize": True, "fps": 2.0}
    (tmp_path / "first" / "processor_config.json").write_text(json.dumps(written))
    load_processor(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "processor_config.json").read_text()) == written
    assert written["video_processor"]["video_processor_type"].endswith("VideoProcessor")


def test_folder_of_an_older_transformers_is_read(tmp_path: Path) -> None:
    """Before version 5: one file for the images, which names their class only, and none for the whole."""
    _, processor = built("qwen2_vl")
    processor.save_pretrained(tmp_path)
    images = json.loads((tmp_path / "processor_config.json").read_text())["image_processor"]
    (tmp_path / "processor_config.json").unlink()
    old = {**images, "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen2VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    again = load_processor(tmp_path)
    assert again.video_processor.to_dict()["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert_same(example_batch("qwen2_vl", processor), example_batch("qwen2_vl", again))


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_video_is_refused_with_what_to_install(name: str) -> None:
    _, processor = built(name)
    assert isinstance(processor.video_processor, MissingVideo)
    with pytest.raises(UserError, match=f"{processor.video_processor.entry['video_processor_type']} needs torchvision"):
        processor(text=[f"what? {processor.video_token}"], videos=[torch.zeros(2, 3, 28, 28)])


@pytest.mark.parametrize("name", [name for name in BUILDERS if name not in ("florence2", "blip_2")])
def test_chat_template_tokenizes_images(name: str) -> None:
    from zoo.parts import picture

    _, processor = built(name)
    parts = [{"type": "image", "image": picture(0, 40, 60)}, {"type": "text", "text": "what colour?"}]
    batch = processor.apply_chat_template(
        [[{"role": "user", "content": parts}]], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert batch["pixel_values"].numel() > 0 and batch["input_ids"].shape[0] == 1


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_processor_travels_to_other_processes(name: str) -> None:
    _, processor = built(name)
    again = pickle.loads(pickle.dumps(processor))
    assert type(again).__name__ == type(processor).__name__
    assert_same(example_batch(name, processor), example_batch(name, again))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "mllama"])
def test_loaded_model_equals_the_saved_one(name: str, tmp_path: Path) -> None:
    model, processor = built(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, its_processor = load_model(tmp_path, device="cpu")
    assert not again.training and again.dtype == torch.float32
    assert again.config._attn_implementation == "sdpa"
    with torch.no_grad():
        logits = model(**example_batch(name, processor)).logits
        assert torch.equal(again(**example_batch(name, its_processor)).logits, logits)
    assert load_model(tmp_path, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "bf16"}, "Unknown dtype 'bf16'. Known: auto, bfloat16, float16, float32. Did you mean 'bfloat16'"),
        ({"attention": "flash"}, "Unknown attention 'flash'"),
        ({"device": "gpu"}, "Device 'gpu' cannot be used.*Here are: cpu"),
        ({}, "could not be loaded.*Check the path"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_what_to_do(options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_model("no-such-folder/model", **options)


def test_a_folder_without_a_model_or_processor_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder, but no model"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="No processor can be loaded"):
        load_processor(tmp_path)


def test_a_text_only_model_is_pointed_to_composition(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from zoo.parts import TEXT

    LlamaForCausalLM(LlamaConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no vision-language model.*ComposedVLM"):
        load_model(tmp_path)
