"""A composed model of several encoders: added up or weighed by the instruction, joined later, and images in crops."""

import copy
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from alula.data.collate import Collator
from alula.data.sample import Sample
from alula.errors import UserError
from alula.models.anatomy import anatomy
from alula.models.composed import ComposedVLM
from alula.models.composed_processor import ComposedImageProcessor, ComposedProcessor, count_image_tokens
from alula.models.composition import add_encoder, check_composition
from alula.models.connectors import LinearConnector
from alula.models.instructions import instructions_of
from alula.models.vision_mixture import EncoderGroup, InstructionRouter, JoinedGate, VisionMixture
from composed_models import (
    DEFORMABLE,
    PATCH,
    POOL,
    SPECIAL,
    VIT,
    WIDTH,
    asked,
    bytes_tokenizer,
    loud,
    make_processor,
    mixture_config,
    picture,
    save_sentences,
)

GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a sentence encoder with random weights."""
    return save_sentences(tmp_path_factory.mktemp("sentences"))


@pytest.fixture(scope="module")
def processor(sentences: str) -> ComposedProcessor:
    return make_processor(sentences)


def test_the_mixture_is_the_weighted_sum_of_the_papers_equations() -> None:
    connectors = [LinearConnector(width, 4, grid=(2, 3)) for width in (6, 8, 10)]
    router = InstructionRouter(num_encoders=3, input_dim=5, hidden_dim=7)
    mixture = VisionMixture(connectors, router=router)
    features, instruction = [torch.randn(2, 6, width) for width in (6, 8, 10)], torch.randn(2, 5)
    mixed = mixture(features, instruction)
    for image in range(2):
        inner = functional.gelu(router.inner.weight @ instruction[image] + router.inner.bias)
        shares = torch.softmax(router.outer.weight @ inner + router.outer.bias, 0)
        parts = [share * link(rows[image]) for share, link, rows in zip(shares, connectors, features, strict=True)]
        torch.testing.assert_close(mixed.tokens[image], sum(parts))
        torch.testing.assert_close(mixed.weights[image], shares)
        torch.testing.assert_close(mixed.importance[image], torch.stack([part.square().sum().sqrt() for part in parts]))
    added = VisionMixture(connectors, router=None)(features, None)
    torch.testing.assert_close(added.tokens, sum(link(rows) for link, rows in zip(connectors, features, strict=True)))
    torch.testing.assert_close(mixed.weights.sum(-1), torch.ones(2))


def test_a_joined_encoder_is_silent_at_birth_and_then_takes_its_share_from_the_others() -> None:
    connectors = [LinearConnector(6, 4, grid=(1, 2)) for _ in range(3)]
    router, gate = InstructionRouter(num_encoders=2, input_dim=5), JoinedGate(InstructionRouter(num_encoders=1, input_dim=5))
    features, instruction = [torch.randn(2, 2, 6) for _ in range(3)], torch.randn(2, 5)
    before = VisionMixture(connectors[:2], router=router)(features[:2], instruction)
    mixture = VisionMixture(connectors, router=router, gates=[gate])
    born = mixture(features, instruction)
    assert torch.equal(born.tokens, before.tokens)
    assert born.weights[:, 2].tolist() == [0, 0]
    born.tokens.square().sum().backward()
    assert gate.amount.grad.abs() > 0  # silent, but not deaf
    with torch.no_grad():
        gate.amount.fill_(0.5)
    grown = mixture(features, instruction)
    share = torch.tensor(0.5).tanh() * gate.share.scores(instruction).sigmoid()
    torch.testing.assert_close(grown.tokens, before.tokens * (1 - share[..., None]) + connectors[2](features[2]) * share[..., None])
    torch.testing.assert_close(grown.weights.sum(-1), torch.ones(2))


@pytest.mark.parametrize("names_its_own", [True, False])
@torch.no_grad()
def test_each_encoder_sees_pixels_of_its_own_size_and_normalisation(names_its_own: bool) -> None:
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    model = ComposedVLM(mixture_config(encoder_config=[VIT | (imagenet if names_its_own else {}), PATCH | half])).eval()
    seen: list[torch.Tensor] = []
    for encoder in model.vision_tower.encoders:
        encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    colours = torch.tensor([0.2, 0.6, 0.9]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    mean, std = (torch.tensor(imagenet[key]).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    model.get_image_features((colours - mean) / std, torch.zeros(1, WIDTH))
    assert [pixels.shape[-1] for pixels in seen] == [32, 64]
    torch.testing.assert_close(seen[0], ((colours - mean) / std)[..., :32, :32])
    torch.testing.assert_close(seen[1], (colours - 0.5) / 0.5)


def test_an_instruction_is_the_turn_an_image_stands_in_and_never_an_answer(processor: ComposedProcessor) -> None:
    question = "<|im_start|>user\n<image>\nwhat is\nthis?<|im_end|>\n<|im_start|>assistant\n"
    rest = "a cat<|im_end|>\n<|im_start|>user\n<image> and <image>here<|im_end|>\n<|im_start|>assistant\n<image>a dog"
    assert instructions_of(question, image_token="<image>") == ["what is this?"]
    assert instructions_of(question + rest, image_token="<image>") == ["what is this?", "and here", "and here", ""]
    asked, answered = (
        processor(text=[question + answer], images=[picture(1)], return_tensors="pt")["instruction_embedding"] for answer in ("", "a cat")
    )
    assert asked.shape == (1, WIDTH)
    assert torch.equal(asked, answered)
    with pytest.raises(UserError, match=r"outside of any .* turn.*give instructions="):
        processor(text=["<image>what?"], images=[picture(1)])
    given = processor(text=["<image>a", "b", "<image><image>c"], images=[picture(1)] * 3, instructions=["x", "y", "z"], padding=True)
    assert len(given["instruction_embedding"]) == 3
    assert (given["instruction_embedding"][1] == given["instruction_embedding"][2]).all()
    assert "instruction_embedding" not in processor(text=["no image"])


def test_two_encoders_learn_answer_and_come_back_from_a_folder(processor: ComposedProcessor, tmp_path: Path) -> None:
    model = loud(ComposedVLM(mixture_config()))
    questions, images = ["<image>what is on <image>?", "no image", "<image>x"], [[picture(1), picture(2)], [], [picture(3)]]
    batch = asked(processor, questions, images, padding_side="left")
    output = model(**batch, labels=batch["input_ids"])
    output.loss.backward()
    assert {name for name, value in model.named_parameters() if value.grad is None} == set()
    assert output.encoder_weights.shape == output.encoder_importance.shape == (3, 2)
    assert not torch.allclose(output.encoder_weights[0], output.encoder_weights[2])  # another question, other shares
    parts = anatomy(model)
    assert (parts.encoder, parts.connector) == (("vision_tower",), ("connector",))
    assert parts.part_of("connector.router.inner.weight") == "connector"
    calls: list[int] = []
    model.vision_tower.register_forward_hook(lambda module, inputs, output: calls.append(len(output[0])))
    together = model.generate(**batch, **GENERATE)
    assert calls == [3]  # at prefill, once
    beams = model.generate(**batch, **GENERATE, num_beams=2)
    for row in (0, 2):
        single = asked(processor, [questions[row]], [images[row]])
        assert torch.equal(model.generate(**single, **GENERATE)[0, -4:], together[row, -4:])
        assert torch.equal(model.generate(**single, **GENERATE, num_beams=2)[0, -4:], beams[row, -4:])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    again = asked(loaded_processor, questions, images, padding_side="left")
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    with torch.no_grad():
        assert torch.equal(loaded(**again).logits, model(**batch).logits)
        with pytest.raises(UserError, match="instruction_encoder='minilm'"):
            model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
        with pytest.raises(UserError, match="1 instruction embeddings came with 3 images"):
            model(**batch | {"instruction_embedding": batch["instruction_embedding"][:1]})


# torch's own: pin_memory without an accelerator.
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_trainer_of_transformers_trains_the_router(processor: ComposedProcessor, tmp_path: Path) -> None:
    model = ComposedVLM(mixture_config())
    before = copy.deepcopy(model.state_dict())
    rows = [Sample.ask("what?", "a cat", images=(picture(1),)), Sample.ask("how many?", "two", images=(picture(2),))]
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, remove_unused_columns=False, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    Trainer(model, settings, data_collator=Collator(processor), train_dataset=rows).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    roots = (
        "connector.router.",
        "connector.connectors.0.",
        "connector.connectors.1.",
        "vision_tower.encoders.0.",
        "vision_tower.encoders.1.",
    )
    assert [root for root in roots if not any(name.startswith(root) for name in changed)] == []


@pytest.mark.parametrize("mixing", ["router", "add"])
@torch.no_grad()
def test_an_added_encoder_changes_nothing_that_was_there(mixing: str, processor: ComposedProcessor, tmp_path: Path) -> None:
    model = loud(ComposedVLM(mixture_config(mixing=mixing)))
    batch = asked(processor, ["<image>what is it?", "no image"], [[picture(1)], []])
    old, known = model(**batch).logits, {name: value.clone() for name, value in model.named_parameters()}
    new = add_encoder(model, {**VIT, "dim": 24, "patch_size": 16}, connector=POOL)
    assert torch.equal(model(**batch).logits, old)
    assert {name for name, _ in model.named_parameters()} == known.keys() | set(new)
    assert all(torch.equal(value, known[name]) for name, value in model.named_parameters() if name in known)
    assert {name.split(".")[0] for name in new} == {"vision_tower", "connector"}
    for name, value in model.named_parameters():
        value.requires_grad_(name in new)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0)
    with torch.enable_grad():
        model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    assert not torch.equal(model(**batch).logits, old)
    assert all(torch.equal(value, known[name]) for name, value in model.named_parameters() if name in known)
    (gate,) = model.connector.gates
    amount = gate.amount.clone()
    gate.amount.zero_()
    assert torch.equal(model(**batch).logits, old)  # what was there still says what it said
    gate.amount.copy_(amount)
    add_encoder(model, VIT, connector=POOL)  # and one more, on what was learnt
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded(**batch).encoder_weights.shape == (1, 4)


@torch.no_grad()
def test_an_encoder_can_join_a_model_of_one() -> None:
    model = loud(ComposedVLM(mixture_config(encoder_config=VIT, connector_config=POOL, mixing="add")))
    pixels = torch.randn(2, 3, 32, 32)
    old = model.get_image_features(pixels).pooler_output
    add_encoder(model, PATCH | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, connector=DEFORMABLE)
    assert isinstance(model.vision_tower, EncoderGroup)
    assert torch.equal(model.get_image_features(pixels).pooler_output, old)
    with pytest.raises(UserError, match="4 and 4 and 16 tokens"):
        add_encoder(model, VIT, connector="mlp")


@torch.no_grad()
def test_crops_are_the_image_and_its_parts_and_their_tokens_add_up() -> None:
    images = ComposedImageProcessor(size={"height": 64, "width": 64}, crops=2)
    processor = ComposedProcessor(images, bytes_tokenizer(SPECIAL), image_seq_length=count_image_tokens(4, crops=2))
    model = loud(ComposedVLM(mixture_config(encoder_config=VIT | {"image_size": 64}, connector_config=POOL, crops=2, image_seq_length=20)))
    batch = asked(processor, ["<image>a<image>", "<image>b"], [[picture(1), picture(2)], [picture(3)]])
    views = batch["pixel_values"]
    assert views.shape == (3, 5, 3, 64, 64)
    assert (batch["input_ids"] == 3).sum(-1).tolist() == [40, 20]
    whole = ComposedImageProcessor(size={"height": 64, "width": 64})(picture(1), return_tensors="pt")["pixel_values"][0]
    large = ComposedImageProcessor(size={"height": 128, "width": 128})(picture(1), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(views[0, 0], whole)
    assert torch.equal(torch.cat([torch.cat([*views[0, 1:3]], -1), torch.cat([*views[0, 3:5]], -1)], -2), large)
    tokens = model.get_image_features(views).pooler_output
    assert tokens.shape == (3, 20, 32)
    torch.testing.assert_close(tokens[1, 8:12], model.get_image_features(views[1:2, 2]).pooler_output[0], atol=1e-5, rtol=1e-4)
    model.generate(**batch, **GENERATE, num_beams=2)
    with pytest.raises(UserError, match=r"20 tokens for an image in each of 5 views of 4\. Set image_seq_length=20"):
        check_composition(mixture_config(encoder_config=VIT, connector_config=POOL, crops=2))
    with pytest.raises(UserError, match="Set crops=0 or crops=2"):
        mixture_config(crops=1)


def test_several_encoders_and_crops_go_together(processor: ComposedProcessor, sentences: str) -> None:
    images = ComposedImageProcessor(size={"height": 64, "width": 64}, crops=2)
    cut = ComposedProcessor(images, processor.tokenizer, image_seq_length=20, instruction_encoder=sentences)
    output = loud(ComposedVLM(mixture_config(crops=2, image_seq_length=20)))(**asked(cut, ["<image>a"], [[picture(1)]]))
    assert output.encoder_importance.shape == (1, 2)


def test_a_rank_without_images_keeps_the_whole_mixture_in_its_graph(processor: ComposedProcessor, tmp_path: Path) -> None:
    model = ComposedVLM(mixture_config()).train()
    batch = asked(processor, ["text only"], [[]])
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(value.grad is not None and not value.grad.any() for value in model.connector.parameters())
