"""ComposedVLM: any backbone + encoder + connector behaves as one of Transformers' own vision-language models."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from alula.errors import UserError
from alula.models.composed import ComposedConfig, ComposedVLM
from alula.models.composed_processor import ComposedProcessor
from alula.models.connectors import CONNECTORS
from alula.models.encoders import ENCODERS
from composed_models import BACKBONES, batch_of, make_processor, picture, tiny_model


@pytest.fixture(scope="module")
def processor() -> ComposedProcessor:
    return make_processor()


@pytest.mark.parametrize(("encoder", "connector"), [*((name, "mlp") for name in ENCODERS), *(("hf", name) for name in CONNECTORS)])
def test_saved_folder_loads_bit_identical_through_the_auto_classes(
    encoder: str, connector: str, processor: ComposedProcessor, tmp_path: Path
) -> None:
    model = tiny_model(encoder, connector)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    texts, images = ["<image>what?", "plain text"], [[picture(1)], []]
    batch, again = batch_of(processor, texts, images), batch_of(loaded_processor, texts, images)
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, loaded(**again).logits)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight  # still tied
    assert loaded_processor.chat_template == processor.chat_template


@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_backbone_generates_the_same_with_and_without_cache(backbone: str, processor: ComposedProcessor) -> None:
    model = tiny_model(backbone=backbone)
    batch = batch_of(processor, ["<image>what is it?"], [[picture(2)]])
    cached, uncached = (
        model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0)
        for use_cache in (True, False)
    )
    assert cached.shape[1] == batch["input_ids"].shape[1] + 6
    assert torch.equal(cached, uncached)


def test_an_image_is_encoded_once_in_a_generation(processor: ComposedProcessor) -> None:
    model = tiny_model()
    calls: list[int] = []
    model.vision_tower.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    batch = batch_of(processor, ["<image>a"], [[picture(2)]])
    model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert calls == [1]


def test_left_padded_mixed_batch_equals_its_rows_alone(processor: ComposedProcessor) -> None:
    model = tiny_model()
    texts = ["<image>what is on <image>?", "no image in this one", "<image>x"]
    images = [[picture(1), picture(2)], [], [picture(3)]]
    keywords = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    batch = batch_of(processor, texts, images, padding_side="left")
    together = model.generate(**batch, **keywords)[:, -5:]
    beams = model.generate(**batch, **keywords, num_beams=2)[:, -5:]
    with torch.no_grad():
        last = model(**batch).logits[:, -1]
    assert len({tuple(row.tolist()) for row in together}) == len(texts)  # what is read does matter
    for row in range(len(texts)):
        single = batch_of(processor, [texts[row]], [images[row]])
        assert torch.equal(model.generate(**single, **keywords)[0, -5:], together[row])
        assert torch.equal(model.generate(**single, **keywords, num_beams=2)[0, -5:], beams[row])
        with torch.no_grad():
            alone = model(**single).logits[0, -1]
        # Padding changes the order in which float32 sums are taken, nothing else.
        torch.testing.assert_close(alone, last[row], atol=2e-5, rtol=1e-4)


def test_images_take_their_placeholders_in_reading_order(processor: ComposedProcessor) -> None:
    model = tiny_model()
    batch = batch_of(processor, ["a<image>b<image>"], [[picture(1), picture(2)]])
    with torch.no_grad():
        tokens = model.get_image_features(batch["pixel_values"]).pooler_output
        seen = model(**batch, output_hidden_states=True)
    at = batch["input_ids"][0] == model.config.image_token_id
    assert at.tolist() == [False, *[True] * 4, False, *[True] * 4]
    assert torch.equal(seen.hidden_states[0][0, at], tokens.flatten(0, 1))
    assert torch.equal(seen.image_hidden_states, tokens)
    assert not torch.equal(tokens[0], tokens[1])


def test_text_only_prompt_is_bit_identical_to_the_backbone(processor: ComposedProcessor) -> None:
    model = tiny_model()
    batch = batch_of(processor, ["no image", "none here either"], [[], []])
    assert "pixel_values" not in batch
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, model.language_model(**batch).logits)


def test_embeddings_in_place_of_ids_give_the_same_logits(processor: ComposedProcessor) -> None:
    model = tiny_model()
    batch = batch_of(processor, ["a<image>b"], [[picture(1)]])
    with torch.no_grad():
        expected = model(**batch).logits
        embedded = model.get_input_embeddings()(batch.pop("input_ids"))
        assert torch.equal(model(inputs_embeds=embedded, **batch).logits, expected)


def test_mismatch_of_placeholders_and_images_is_a_user_error(processor: ComposedProcessor) -> None:
    model = tiny_model()
    batch = batch_of(processor, ["<image>a"], [[picture(1)]])
    with pytest.raises(UserError, match=r"4 image placeholders .* with 2 images"):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"].repeat(2, 1, 1, 1))
    with pytest.raises(UserError, match="with 0 images"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(UserError, match="Exactly one"):
        model(pixel_values=batch["pixel_values"])
    with pytest.raises(UserError, match="1 <image> placeholders in all, but 2 images"):
        processor(text=["<image>a"], images=[picture(1), picture(2)])
    with pytest.raises(UserError, match="row by row"):
        processor(text=["<image>a", "b<image>"], images=[[picture(1), picture(2)], []])
    with pytest.raises(UserError, match="but 0 images"):
        processor(text=["<image>a"])


class Spy(nn.Module):
    """Stands where an attention module stood and remembers the keyword."""

    def __init__(self, host: nn.Module, seen: list[tuple[int, object]]) -> None:
        super().__init__()
        self.host, self.seen = host, seen

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> object:
        self.seen.append((hidden_states.shape[1], kwargs.get("alula_context")))
        return self.host(hidden_states, *args, **kwargs)


def test_unknown_keyword_reaches_attention_in_prefill_and_decoding(processor: ComposedProcessor) -> None:
    model = tiny_model()
    seen: list[tuple[int, object]] = []
    layer = model.get_decoder().layers[1]
    layer.set_submodule("self_attn", Spy(layer.self_attn, seen))
    batch = batch_of(processor, ["<image>ab"], [[picture(1)]])
    context = {"what": "ever"}
    model(**batch, alula_context=context, labels=batch["input_ids"])
    # generate() refuses keywords it does not know; a hook adds this one to each call, as mixtures do.
    model.register_forward_pre_hook(lambda module, inputs, keywords: (inputs, keywords | {"alula_context": context}), with_kwargs=True)
    model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert [tokens for tokens, _ in seen] == [6, 6, 1, 1]
    assert all(value is context for _, value in seen)


def test_gradient_checkpointing_gives_equal_gradients(processor: ComposedProcessor) -> None:
    model = tiny_model().train()
    batch = batch_of(processor, ["<image>abc", "text only"], [[picture(1)], []])
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    plain = gradients()
    # Transformers 5.23 renamed it; the old name then warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in model.get_decoder().layers)
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    assert {"connector.inner.weight", "language_model.model.layers.0.mlp.up_proj.weight"} <= plain.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_training_leaves_the_batch_statistics_of_the_encoder_alone(processor: ComposedProcessor) -> None:
    model = tiny_model().train()
    before = copy.deepcopy(dict(model.vision_tower.named_buffers()))
    model(**batch_of(processor, ["<image>a"], [[picture(1)]]))
    assert model.language_model.training
    assert not any(module.training for module in model.vision_tower.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.vision_tower.named_buffers())


def test_a_rank_without_images_still_touches_the_connector(processor: ComposedProcessor, tmp_path: Path) -> None:
    model = tiny_model().train()
    batch = batch_of(processor, ["text only"], [[]])
    alone = model(**batch, labels=batch["input_ids"]).loss
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        loss = model(**batch, labels=batch["input_ids"]).loss
    finally:
        torch.distributed.destroy_process_group()
    loss.backward()
    assert torch.equal(loss, alone)
    assert all(value.grad is not None and not value.grad.any() for value in model.connector.parameters())


def test_parts_that_do_not_fit_are_refused_with_the_right_value() -> None:
    with pytest.raises(UserError, match="Set image_seq_length=16"):
        ComposedVLM(ComposedConfig(text_config=BACKBONES["llama"], image_seq_length=9))
    with pytest.raises(UserError, match="multiples of 32"):
        ENCODERS["efficientnet_lite0"](image_size=100)
    with pytest.raises(UserError, match="patch_size"):
        ENCODERS["hf"](config={"model_type": "clip_vision_model", "image_size": 64, "hidden_size": 8})
    with pytest.raises(UserError, match="Did you mean 'efficientnet_lite0'"):
        ComposedVLM(ComposedConfig(text_config=BACKBONES["llama"], encoder_config={"name": "efficientnet_lite"}))


def test_chat_template_renders_parts_and_strings_alike_without_a_system_prompt(processor: ComposedProcessor) -> None:
    parts = [
        {"role": "user", "content": [{"type": "image", "image": picture(1)}, {"type": "text", "text": "\nwhat?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    strings = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "a cat"}]
    text = processor.apply_chat_template(strings)
    assert text == "<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
    assert processor.apply_chat_template(parts) == text
    assert processor.apply_chat_template(strings[:1], add_generation_prompt=True) == text[: -len("a cat<|im_end|>\n")]
    batch = processor.apply_chat_template(parts, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt")
    mask = torch.as_tensor(batch["assistant_masks"][0]).bool()
    assert processor.tokenizer.decode(batch["input_ids"][0][mask]) == "a cat<|im_end|>"
