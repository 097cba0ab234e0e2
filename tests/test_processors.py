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
from zoo import EVERY, build, example_batch

WITH_VIDEO = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"),
    *("llava_onevision", "smolvlm", "internvl", "glm4v", "gemma4"),
)
built = cache(build)


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("name", EVERY)
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


# What transformers 5.23 with torchvision 0.28 wrote for the zoo's Qwen2-VL, without the keys both kinds of processor share.
WRITTEN_WITH_TORCHVISION = {
    "image_processor": {"image_processor_type": "Qwen2VLImageProcessor", "merge_size": 2, "patch_size": 14, "temporal_patch_size": 2},
    "processor_class": "Qwen2VLProcessor",
    "video_processor": {
        "do_convert_rgb": True,
        "do_sample_frames": False,
        "max_frames": 768,
        "max_video_tokens": 128000,
        "merge_size": 2,
        "min_frames": 4,
        "patch_size": 14,
        "return_metadata": False,
        "size": {"longest_edge": 602112, "shortest_edge": 100352},
        "temporal_patch_size": 2,
        "video_processor_type": "Qwen2VLVideoProcessor",
    },
}


def test_folder_written_with_torchvision_is_read_and_written_again(tmp_path: Path) -> None:
    _, processor = built("qwen2_vl")
    processor.save_pretrained(tmp_path)
    sizes = {"size": {"longest_edge": 112 * 112, "shortest_edge": 56 * 56}}
    theirs = WRITTEN_WITH_TORCHVISION | {"image_processor": WRITTEN_WITH_TORCHVISION["image_processor"] | sizes}
    (tmp_path / "processor_config.json").write_text(json.dumps(theirs))
    again = load_processor(tmp_path)
    assert_same(example_batch("qwen2_vl", processor), example_batch("qwen2_vl", again))
    again.save_pretrained(tmp_path / "ours")
    ours = json.loads((tmp_path / "ours" / "processor_config.json").read_text())
    assert ours["video_processor"] == theirs["video_processor"] and ours["processor_class"] == "Qwen2VLProcessor"
    assert ours["image_processor"] | theirs["image_processor"] == ours["image_processor"], "also under the class's common name"


@pytest.mark.parametrize(
    ("class_name", "image_class"), [("PixtralProcessor", "PixtralImageProcessorPil"), ("Llama4Processor", "Llama4ImageProcessor")]
)
def test_a_processor_written_on_torchvision_is_refused_with_what_is_missing(class_name: str, image_class: str, tmp_path: Path) -> None:
    built("llava")[1].tokenizer.save_pretrained(tmp_path)
    entry = {"processor_class": class_name, "image_processor": {"image_processor_type": image_class}}
    (tmp_path / "processor_config.json").write_text(json.dumps(entry))
    with pytest.raises(UserError, match=r"package that is missing here: .*[Tt]orchvision"):
        load_processor(tmp_path)


def test_folder_with_one_file_for_images_and_one_for_videos_is_read(tmp_path: Path) -> None:
    """As transformers 4.52 to 4.57 wrote it."""
    _, processor = built("qwen2_vl")
    processor.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").unlink()
    images = written["image_processor"] | {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen2VLProcessor"}
    videos = WRITTEN_WITH_TORCHVISION["video_processor"] | {"processor_class": "Qwen2VLProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(videos))
    again = load_processor(tmp_path)
    assert again.video_processor.to_dict() == WRITTEN_WITH_TORCHVISION["video_processor"]
    assert_same(example_batch("qwen2_vl", processor), example_batch("qwen2_vl", again))


def test_folder_of_an_older_transformers_is_read(tmp_path: Path) -> None:
    """Before version 4.52: one file for the images, which names their class only, and none for the whole."""
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
        processor(text=[f"what? {processor.video_token}"], videos=[[torch.zeros(2, 3, 28, 28)]])  # a list a text, as SmolVLM counts


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("florence2", "blip_2")])
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
        ({"dtype": "bf16"}, "Unknown dtype 'bf16'. Known: .*auto, bfloat16, float16, float32. Did you mean 'bfloat16'"),
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
