"""Prefix tuning: learnt keys and values do what real tokens in front would do, whatever the batch and the cache."""

import pytest
import torch
from transformers import LlamaConfig

from alula.data.collate import Collator
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.methods import METHODS
from alula.mixture.prefix import attach_prefixes
from alula.models.composed import ComposedConfig, ComposedVLM
from alula.training import Trainer, TrainSettings
from resume_worker import pictures, tiny_model
from zoo import build, example_batch

SETTINGS = TrainSettings(steps=2, batch_size=4, learning_rate=1e-2)


def composed():
    backbone = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    encoder = {"name": "efficientnet_lite0", "image_size": 32}
    return ComposedVLM(ComposedConfig(text_config=backbone, image_seq_length=1, encoder_config=encoder)).eval()


def filled(model, *, num_virtual_tokens=6):
    """A model that sees the activations of a random text."""
    prefixes = attach_prefixes(model, num_virtual_tokens=num_virtual_tokens)
    ids = torch.randint(5, 30, (1, num_virtual_tokens))
    prefixes.fill({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    prefixes.speak()
    return prefixes


def given(name, *, text_only=False):
    if name != "composed":
        model, processor = build(name)
        return model, example_batch(name, processor, text_only=text_only)
    ids = torch.tensor([[0, 0, 7, 4, 9], [7, 8, 4, 11, 12]])
    return composed(), {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": torch.randn(2, 3, 32, 32)}


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prefix_of_real_activations_is_that_text(attention):
    model = tiny_model().eval()
    model.set_attn_implementation(attention)
    ids = torch.randint(1, 40, (2, 9))
    ids[1, :4] = ids[0, :4]
    with torch.no_grad():
        expected = model(ids).logits[:, 4:]
        prefixes = attach_prefixes(model, num_virtual_tokens=4)
        prefixes.fill({"input_ids": ids[:1, :4], "attention_mask": torch.ones(1, 4)})
        prefixes.speak()
        found = model(ids[:, 4:], position_ids=torch.arange(4, 9)[None]).logits
    torch.testing.assert_close(found, expected)


def test_the_model_is_untouched_until_the_prefix_speaks():
    model, batch = given("llava")
    with torch.no_grad():
        before = model(**batch).logits
        prefixes = attach_prefixes(model, num_virtual_tokens=5)
        assert torch.equal(model(**batch).logits, before)
        prefixes.speak()
        assert not torch.allclose(model(**batch).logits, before, atol=1e-3)  # zero keys take attention


def test_the_encoder_keeps_its_attention():
    model, batch = given("llava")
    with torch.no_grad():
        before = torch.cat(list(model.get_image_features(batch["pixel_values"]).pooler_output))
        filled(model)
        assert torch.equal(torch.cat(list(model.get_image_features(batch["pixel_values"]).pooler_output)), before)
    assert model.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llava", "composed", "qwen2_vl", "gemma3", "mllama"])
def test_cached_decoding_equals_recomputation(name):
    model, batch = given(name)
    filled(model)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached, whole = (model.generate(**batch, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "text_only"), [("llava", False), ("llava", True), ("composed", False)])
def test_left_padded_rows_are_what_they_are_alone(name, text_only):
    model, batch = given(name, text_only=text_only)
    filled(model)
    mask = batch["attention_mask"]
    assert not mask.all()
    with torch.no_grad():
        together = model(**batch, position_ids=positions(mask)).logits
        for row in range(len(mask)):
            kept = mask[row].bool()
            alone = {key: value[row : row + 1] for key, value in batch.items()}
            alone |= {key: alone[key][:, kept] for key in ("input_ids", "attention_mask")}
            torch.testing.assert_close(model(**alone).logits[0], together[row, kept], atol=1e-5, rtol=1e-4)
    generated = model.generate(**batch, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(generated.logits[0], together[:, -1], atol=1e-5, rtol=1e-4)


def test_first_values_come_from_as_many_rows_as_are_needed():
    model = tiny_model().eval()
    prefixes = attach_prefixes(model, num_virtual_tokens=7)
    ids = torch.randint(1, 40, (2, 3))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    for expected in (5, 7, 7):
        prefixes.fill({"input_ids": ids, "attention_mask": mask})
        assert prefixes.num_filled == expected
    for prefix in prefixes.sites.values():
        assert torch.equal(prefix.keys[:, :2], prefix.keys[:, 5:])
        assert prefix.keys.any(-1).all()
        assert prefix.values.any(-1).all()


def test_only_the_prefix_trains_and_the_second_task_goes_on_with_it():
    untouched, _ = build("llava")
    model, processor = build("llava")
    method = METHODS["prefix"](model, settings=SETTINGS, num_virtual_tokens=3)
    tasks = tuple(Task(name=name, train=pictures(name, 6), test=[]) for name in ("colour", "hue"))
    trainer = Trainer(model, method, Collator(processor), settings=SETTINGS, folder=None)
    kept = []
    for learnt in trainer.learn(Stream(tasks=tasks)):
        kept.append({path: prefix.keys.detach().clone() for path, prefix in method.prefixes.sites.items()})
        assert learnt.cost.stored_parameters == learnt.cost.trainable_parameters == 4 * 2 * 2 * 3 * 16  # layers, k and v, heads, n, dim
    assert [stage.name for task in tasks for stage in method.stages(task)] == ["start", "train", "train"]
    assert method.prefixes.num_filled == 3
    for path in kept[0]:
        assert 0 < (kept[1][path] - kept[0][path]).abs().max() < 0.1  # a few steps further, not anew
    before, after = untouched.state_dict(), model.state_dict()
    changed = {name for name, value in after.items() if name not in before or not torch.equal(before[name], value)}
    assert changed == method.trained == {name for name in after if ".prefix." in name}


def test_an_attention_without_a_mask_to_widen_is_refused():
    model = tiny_model()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match=r"'flex_attention'\. Accepted: sdpa, eager"):
        attach_prefixes(model, num_virtual_tokens=2)


def test_no_virtual_tokens_are_refused():
    with pytest.raises(UserError, match="num_virtual_tokens: 0 came; 1 or more"):
        METHODS["prefix"](tiny_model(), settings=SETTINGS, num_virtual_tokens=0)
