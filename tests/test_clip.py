"""CLIP: the loss is the published one, on one process and on two; what it trains is a part that `compose` takes."""

import json
import math

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from alula.data.enriched import enrich, name_pairs
from alula.data.image_collate import PairCollator
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks import load_task
from alula.errors import UserError
from alula.files import read_json, read_jsonl, read_tensors, sha256
from alula.methods.clip import Clip
from alula.models.composition import compose
from alula.models.dual_encoder import DualEncoder
from alula.models.encoders import VitEncoder
from alula.objectives.clip import LARGEST_SCALE, START, clip_loss, gathered
from alula.running.pretrain import pixels_of, pretrain
from alula.training import TrainSettings
from zoo.parts import make_tokenizer

TINY = {"name": "vit", "image_size": 32, "patch_size": 8, "dim": 12, "num_layers": 1}
TEXT_CONFIG = LlamaConfig(vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
SMALL = {"output_dim": 8, "text_dim": 8, "num_text_layers": 1, "num_text_heads": 2}


def test_the_loss_is_symmetric_in_images_and_texts():
    images, texts = torch.randn(2, 5, 7)
    scale = torch.tensor(1.5)
    torch.testing.assert_close(clip_loss(images, texts, scale), clip_loss(texts, images, scale))
    turned = torch.randperm(5)
    assert not torch.isclose(clip_loss(images, texts[turned], scale), clip_loss(images, texts, scale))


def test_the_loss_is_that_of_its_definition():
    images, texts = torch.randn(2, 6, 4)
    u, v = functional.normalize(images, dim=1), functional.normalize(texts, dim=1)
    scores = (torch.tensor(START).exp().clamp(max=100) * u @ v.T).double()
    rows = -scores.log_softmax(1).diagonal().mean()
    columns = -scores.log_softmax(0).diagonal().mean()
    expected = ((rows + columns) / 2).float()
    torch.testing.assert_close(clip_loss(images, texts, torch.tensor(START)), expected)


@pytest.mark.parametrize("num_pairs", [2, 9])
def test_features_of_the_identity_give_the_closed_value(num_pairs):
    scale = math.exp(START)
    expected = math.log(1 + (num_pairs - 1) * math.exp(-scale))
    found = clip_loss(3 * torch.eye(num_pairs), torch.eye(num_pairs), torch.tensor(START))
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert scale == pytest.approx(1 / 0.07)


def test_the_scale_stops_at_a_hundred():
    images, texts = torch.randn(2, 4, 3)
    at_the_end = clip_loss(images, texts, torch.tensor(math.log(LARGEST_SCALE)))
    torch.testing.assert_close(clip_loss(images, texts, torch.tensor(9.0)), at_the_end)
    assert clip_loss(images, texts, torch.tensor(4.0)) < at_the_end


def weights_and_pairs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, generator=generator), torch.randn(8, 3, generator=generator), torch.randn(8, 4, generator=generator)


def one_of_two(rank, folder):
    """One of two processes: its half of the pairs, the loss over all of them, its share of the gradient."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    weight, images, texts = weights_and_pairs()
    weight.requires_grad_()
    scale = torch.tensor(START, requires_grad=True)
    mine = slice(4 * rank, 4 * rank + 4)
    loss = clip_loss(gathered(images[mine] @ weight), gathered(texts[mine]), scale)
    (loss / 2).backward()
    for gradient in (weight.grad, scale.grad):
        distributed.all_reduce(gradient)
    torch.save({"loss": loss.detach(), "weight": weight.grad, "scale": scale.grad}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # from Python 3.12 on, where torch has started threads
def test_two_processes_have_the_loss_and_gradients_of_one(tmp_path):
    multiprocessing.start_processes(one_of_two, args=(str(tmp_path),), nprocs=2, start_method="fork")
    weight, images, texts = weights_and_pairs()
    weight.requires_grad_()
    scale = torch.tensor(START, requires_grad=True)
    loss = clip_loss(images @ weight, texts, scale)
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, {"loss": loss.detach(), "weight": weight.grad, "scale": scale.grad})


@torch.no_grad()
def test_a_texts_row_depends_on_its_tokens_and_not_on_its_neighbours():
    tokenizer = make_tokenizer()
    model = DualEncoder(VitEncoder(image_size=16, dim=12, num_layers=1), vocab_size=len(tokenizer), **SMALL).eval()
    collate = PairCollator(lambda images: torch.zeros(len(images), 3, 16, 16), tokenizer)
    both = model.embed_texts(**collate.texts(["cat", "a much longer text than that"]))
    torch.testing.assert_close(both[:1], model.embed_texts(**collate.texts(["cat"])))
    assert not torch.allclose(both[0], model.embed_texts(**collate.texts(["cow"]))[0])


def test_a_text_is_cut_to_77_tokens_and_keeps_its_end():
    tokenizer = make_tokenizer()
    found = PairCollator(lambda images: torch.zeros(1, 3, 16, 16), tokenizer).texts(["what is this? " * 90, "cat"])
    assert found["input_ids"].shape == (2, 77)
    last = found["attention_mask"].sum(1) - 1
    assert found["input_ids"][torch.arange(2), last].tolist() == [tokenizer.eos_token_id] * 2


def pairs(count=24):
    found = load_task("animals", train_size=count, test_size=8)
    return Task(name="pairs", train=found.train, test=found.test)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    settings = TrainSettings(steps=3, batch_size=8, learning_rate=1e-2)
    task = pairs()
    return pretrain("clip", task, encoder=TINY, settings=settings, folder=folder, probes=[task], options=SMALL, tokenizer=make_tokenizer())


@torch.no_grad()
def test_a_composed_model_takes_what_was_trained_and_shows_it_the_same_pixels(trained, tmp_path):
    about = read_json(trained.with_suffix(".json"))
    assert about["sha256"] == sha256(trained)
    assert about["encoder"] == {**TINY, "weights": "encoder.safetensors"}
    LlamaForCausalLM(TEXT_CONFIG).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, processor = compose(tmp_path, {**about["encoder"], "weights": trained})
    encoder = VitEncoder(**{key: value for key, value in TINY.items() if key != "name"}).eval()
    encoder.load_state_dict(read_tensors(trained))
    images = pairs(1).train[0].open_images()
    pixels = pixels_of(encoder, TINY)(images)
    assert torch.equal(processor.image_processor(images, return_tensors="pt")["pixel_values"], pixels)
    torch.testing.assert_close(model.get_image_features(pixels).last_hidden_state, encoder(pixels))
    with pytest.raises(UserError, match="shape"):
        compose(tmp_path, {**about["encoder"], "dim": 24, "weights": trained})


def test_the_manifest_says_what_was_measured_on_how_many(trained):
    about = read_json(trained.with_suffix(".json"))
    assert {"before", "after"} == set(about["probes"]["pairs"])
    assert (about["probes"]["pairs"]["after"]["num_train"], about["probes"]["pairs"]["after"]["num_test"]) == (24, 8)
    found = about["retrieval"]
    assert found["num_images"] == 8 and 0 <= found["image_to_text"]["1"] <= found["image_to_text"]["5"] <= 1
    rows = read_jsonl(trained.parent / "losses.jsonl")
    assert [row["targets"] for row in rows] == [8, 8, 8]
    assert rows[0]["loss"] == about["first_losses"][0]


@pytest.mark.parametrize(
    ("objective", "head", "message"),
    [
        ("clip", {"foo": 3}, r"The head of clip refuses foo=3: .*It takes output_dim: int = 128"),
        ("clip", {"num_text_heads": 3}, r"The head of clip refuses num_text_heads=3: "),
        ("clip", {"output_dim": 0}, r"The head of clip got output_dim=0. A whole number from 1 up is accepted"),
        ("aim", {"head_dim": 0}, r"The head of aim got head_dim=0. A whole number from 1 up"),
        ("aim", {"foo": 3}, r"The head of aim refuses foo=3"),
    ],
)
def test_a_head_that_cannot_be_built_is_refused_before_training(objective, head, message, tmp_path):
    with pytest.raises(UserError, match=message):
        pretrain(objective, pairs(4), encoder=TINY, settings=TrainSettings(), folder=tmp_path, options=head, tokenizer=make_tokenizer())
    assert not [*tmp_path.iterdir()]


def test_a_batch_of_contrast_is_not_cut():
    model = DualEncoder(VitEncoder(image_size=16, dim=12, num_layers=1), vocab_size=9, **SMALL)
    method = Clip(model, settings=TrainSettings(batch_size=8, micro_batch_size=4))
    with pytest.raises(UserError, match="whole batch at once"):
        method.begin_task(model, pairs(8))


def test_captions_keep_the_name_and_only_some_samples_get_one():
    found = name_pairs(train_size=30, test_size=2)
    captioned = enrich(found.train)
    changed = [(old, new) for old, new in zip(found.train, captioned, strict=True) if old.answer != new.answer]
    assert 30 < len(changed) < 90
    assert all(old.answer in new.answer and old.images == new.images for old, new in changed)
    assert {new.origin for _, new in changed} == {"emoji_en", "flags", "animals", "captions"}
    assert captioned == enrich(found.train)
    assert not any("None" in new.answer or "{" in new.answer for new in captioned)


def test_a_caption_of_a_flag_names_no_continent_as_a_country():
    asked = [sample for sample in load_task("flags", train_size=40).train if sample.id.endswith("/1")]
    said = [new.answer.replace(old.answer, "X") for old, new in zip(asked, enrich(asked, share=1.0), strict=True)]
    assert len(said) > 5 and all(text.endswith("a country in X.") for text in said)


def test_a_teachers_caption_without_the_name_gets_it():
    samples = pairs(4).train
    assert [new.answer for new in enrich(samples, write=lambda sample: "Four legs.", share=1.0)] == [
        f"{old.answer}. Four legs." for old in samples
    ]
    assert json.dumps([new.answer for new in enrich(samples, write=lambda sample: f"One {sample.answer}.", share=1.0)]) == json.dumps(
        [f"One {old.answer}." for old in samples]
    )


@pytest.mark.parametrize(
    ("name", "caption", "has_name"),
    [
        ("ant", "An elephant walks.", False),
        ("ant", "There walks an Ant.", True),
        ("polar bear", "A polar-bear.", True),
        ("polar bear", "A bear at the polar circle.", False),
    ],
)
def test_a_name_is_in_a_caption_by_its_words_not_its_letters(name, caption, has_name):
    (new,) = enrich([Sample.ask("What is this?", name)], write=lambda sample: caption, share=1.0)
    assert new.answer == (caption if has_name else f"{name}. {caption}")


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf"), "0.5", None])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UserError, match=r"share of captions is .* A number from 0 \(none\) to 1 \(all\) is accepted"):
        enrich([], share=share)
