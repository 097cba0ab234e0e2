"""What a frozen encoder says is kept on disk: a hit is a miss bit for bit, and whatever may change the features is seen."""

import copy

import pytest
import torch

from alula import Collator, Stream, Task, Trainer, TrainSettings, compose
from alula.config import check_recipe
from alula.errors import UserError
from alula.files import read_jsonl
from alula.methods import METHODS
from alula.models.anatomy import anatomy
from alula.models.image_cache import ImageCache, _settings, cache_images
from alula.running.cells import list_cells
from alula.training.trainable import set_modes
from composed_models import batch_of, make_processor, picture, tiny_model
from resume_worker import pictures
from zoo import build

FAST = TrainSettings(steps=3, batch_size=2, learning_rate=1e-2)


@pytest.fixture
def pixels():
    return batch_of(make_processor(), ["<image>a", "<image>b", "<image>c"], [[picture(seed)] for seed in (1, 2, 3)])["pixel_values"]


def frozen(encoder="hf"):
    return tiny_model(encoder).requires_grad_(False)


@pytest.mark.parametrize("encoder", ["hf", "efficientnet_lite0", "vit"])
def test_a_hit_equals_a_miss_bit_for_bit_and_both_the_encoder_alone(encoder, pixels, tmp_path):
    model = frozen(encoder)
    alone = torch.cat([model.get_image_features(image).pooler_output for image in pixels.split(1)])
    cache = cache_images(model, tmp_path)
    first = model.get_image_features(pixels[:2])
    again = model.get_image_features(pixels.flip(0))
    assert (cache.hits, cache.misses) == (2, 3)
    torch.testing.assert_close(again.pooler_output.flip(0), alone)
    assert torch.equal(again.last_hidden_state.flip(0)[:2], first.last_hidden_state)
    fresh = cache_images(copy.deepcopy(model), tmp_path)  # as another process finds it
    assert torch.equal(fresh(model.vision_tower, pixels), again.last_hidden_state.flip(0)) and fresh.misses == 0


def test_a_file_that_is_not_whole_is_made_anew(pixels, tmp_path):
    model = frozen()
    cache = cache_images(model, tmp_path)
    expected = model.get_image_features(pixels).last_hidden_state
    cut, changed, _ = sorted(tmp_path.rglob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-9])
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    assert torch.equal(model.get_image_features(pixels).last_hidden_state, expected)
    assert (cache.hits, cache.misses) == (1, 5)
    model.get_image_features(pixels)
    assert (cache.hits, cache.misses) == (4, 5)


def test_another_weight_of_the_encoder_is_another_encoder(pixels, tmp_path):
    model = frozen()
    cache = cache_images(model, tmp_path)
    before = model.get_image_features(pixels).last_hidden_state
    with torch.no_grad():
        next(model.vision_tower.parameters()).mul_(2)
    assert not torch.equal(model.get_image_features(pixels).last_hidden_state, before)
    assert (cache.hits, cache.misses) == (0, 6)


def two_encoders(**statistics):
    part = {"name": "vit", "image_size": 32, "patch_size": 8, "dim": 24, "num_layers": 1}
    torch.manual_seed(0)
    return compose("smol", [part, {**part, **statistics}], [{"name": "average_pool", "num_tokens": 4}] * 2)[0].requires_grad_(False).eval()


def test_another_normalisation_of_one_of_several_encoders_is_another_encoder(pixels, tmp_path):
    model, other = (two_encoders(image_mean=[value] * 3, image_std=[value] * 3) for value in (0.5, 0.25))
    other.load_state_dict(model.state_dict())
    alone = torch.cat([other.get_image_features(image).pooler_output for image in pixels.split(1)])
    cache_images(model, tmp_path)
    cache = cache_images(other, tmp_path)
    model.get_image_features(pixels)
    torch.testing.assert_close(other.get_image_features(pixels).pooler_output, alone)
    assert (cache.hits, cache.misses) == (0, 3)


def test_settings_are_read_however_deep_they_are_nested_and_name_no_place_in_memory():
    def settings(value):
        module = torch.nn.Module()
        module.made_of = value
        return repr(_settings(module))

    assert settings([{"a": ({"b": [1, None]},)}]) != settings([{"a": ({"b": [2, None]},)}])
    assert settings({"a": 1}) != settings({"a": True}) != settings({"a": "True"})
    assert settings([object(), {"a": torch.zeros(1)}]) == settings([object(), {"a": torch.ones(1)}])


def test_a_connector_may_change_beside_the_cache(pixels, tmp_path):
    model = frozen()
    cache = cache_images(model, tmp_path)
    model.connector.requires_grad_(True)
    set_modes(model)
    model.get_image_features(pixels)
    model.get_image_features(pixels).pooler_output.sum().backward()
    assert cache.hits == 3 and all(parameter.grad is not None for parameter in model.connector.parameters())


def test_precision_is_part_of_the_key(pixels, tmp_path):
    model = frozen()
    cache = cache_images(model, tmp_path)
    plain = model.get_image_features(pixels).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        model.get_image_features(pixels)
    assert cache.misses == 6
    assert torch.equal(model.get_image_features(pixels).last_hidden_state, plain)


def test_the_folder_stays_within_its_bound(pixels, tmp_path, caplog):
    model = frozen()
    ImageCache(tmp_path / "one")(model.vision_tower, pixels[:1])
    (file,) = (tmp_path / "one").rglob("*.safetensors")
    cache = cache_images(model, tmp_path / "few", gigabytes=1.2e-9 * file.stat().st_size)
    assert torch.equal(model.get_image_features(pixels).last_hidden_state, model.get_image_features(pixels).last_hidden_state)
    assert len(list((tmp_path / "few").rglob("*.safetensors"))) == 1 and (cache.hits, cache.misses) == (1, 5)
    assert caplog.text.count("is full") == 1
    full = ImageCache(tmp_path / "few", gigabytes=0.0)  # what is in it is still read
    assert torch.equal(full(model.vision_tower, pixels), cache(model.vision_tower, pixels)) and full.hits == 1


def test_an_encoder_that_trains_is_refused(pixels, tmp_path):
    model = frozen()
    cache_images(model, tmp_path)
    model.vision_tower.requires_grad_(True)
    with torch.no_grad():
        model.get_image_features(pixels)  # nothing trains here
    with pytest.raises(UserError, match="cache_images came, but the image encoder trains"):
        model.get_image_features(pixels)
    model.requires_grad_(False).train()
    with pytest.raises(UserError, match="the image encoder trains"):
        model.get_image_features(pixels)


def test_an_encoder_with_something_attached_is_refused(pixels, tmp_path):
    model = frozen("vit")
    cache_images(model, tmp_path)
    path, linear = next((path, module) for path, module in model.vision_tower.named_modules() if isinstance(module, torch.nn.Linear))
    wrapper = torch.nn.Module()
    wrapper.base_layer, wrapper.forward = linear, lambda x: linear(x)
    model.vision_tower.set_submodule(path, wrapper.eval())
    with pytest.raises(UserError, match="something is attached to the image encoder"):
        model.get_image_features(pixels)


def test_models_whose_encoder_sees_the_whole_batch_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"LlavaForConditionalGeneration; only a ComposedVLM"):
        cache_images(build("llava")[0], tmp_path)


def test_training_and_generation_ask_the_encoder_once_for_each_image(tmp_path):
    model = frozen()
    samples = pictures("colours", 3)
    cache, collator = cache_images(model, tmp_path / "images"), Collator(make_processor())
    method = METHODS["finetune"](model, settings=FAST, rank=2)
    trainer = Trainer(model, method, collator, settings=FAST, folder=tmp_path / "run")
    list(trainer.learn(Stream(tasks=(Task(name="colours", train=samples, test=[]),))))
    assert (cache.misses, cache.hits) == (3, 3)
    with torch.no_grad():
        model.generate(**collator.prompts(samples), max_new_tokens=2)
    assert (cache.misses, cache.hits) == (3, 6)
    assert len(read_jsonl(tmp_path / "run" / "losses.jsonl")) == 3


def test_full_training_leaves_the_encoder_frozen_and_so_may_use_the_cache(tmp_path):
    model = tiny_model("hf")
    cache = cache_images(model, tmp_path)
    trainer = Trainer(model, METHODS["finetune_full"](model, settings=FAST), Collator(make_processor()), settings=FAST, folder=None)
    list(trainer.learn(Stream(tasks=(Task(name="colours", train=pictures("colours", 3), test=[]),))))
    assert anatomy(model).encoder and cache.hits == 3


@pytest.mark.parametrize(("chosen", "folder"), [(False, None), (True, "run/images"), ("shared", "shared")])
def test_a_recipe_says_where_the_features_are_kept(chosen, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = {"tasks": ["digits"], "methods": ["finetune"], "cache_images": chosen}
    (cell,) = list_cells(check_recipe(raw), tmp_path / "run")
    found = cell.image_cache
    assert (found and found.absolute()) == (folder and tmp_path / folder)
