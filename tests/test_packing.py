"""Claims about pre-training data: documents are real and interleaved, ratios hold, and packed samples never see one another."""

from collections import Counter

import pytest
import torch

from alula.data.collate import IGNORED, Collator
from alula.data.documents import RATIOS, captions, documents, pretraining_blend, texts
from alula.data.packing import PackingCollator, fill
from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.methods import METHODS
from alula.objectives import next_token_loss
from alula.training import Trainer, TrainSettings
from zoo import build
from zoo.parts import picture

WORDS = ("what colour is the square?", "how many?", "is the star left?")


def rows(*, images=True, seed=0):
    """Three samples, two of them with pictures; `seed` is that of the first one's."""
    shown = ((picture(seed, 40, 60),), (), (picture(1, 50, 30),))
    return [Sample.ask(text, "red", images=shown[index] if images else (), id=str(index)) for index, text in enumerate(WORDS)]


def packer(name, model, processor, **options):
    positions = None
    if name == "qwen2_vl":
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        positions = lambda row: model.model.get_rope_index(**{key: row[key] for key in names if key in row})[0]  # noqa: E731
    return PackingCollator(Collator(processor), positions=positions, **options)


@torch.no_grad()
def logits(model, batch):
    return model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits


@pytest.mark.parametrize("form", ["positions", "mask"])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl", "idefics3"])
def test_a_changed_sample_leaves_the_logits_of_its_neighbours_bit_identical(name, form):
    model, processor = build(name)
    collate = packer(name, model, processor, form=form)
    batch, another_picture, another_word = collate(rows()), collate(rows(seed=9)), collate(rows())
    assert batch["input_ids"].shape[0] == 1 and torch.equal(batch["input_ids"], another_picture["input_ids"])
    alone = [collate.collator([sample]) for sample in rows()]
    lengths = [row["input_ids"].shape[1] for row in alone]
    another_word["input_ids"][0, lengths[0] + 1] = 300
    first = logits(model, batch)[0].split(lengths)
    for changed, other in ((0, another_picture), (1, another_word)):
        found = zip(first, logits(model, other)[0].split(lengths), strict=True)
        assert [torch.equal(mine, theirs) for mine, theirs in found] == [index != changed for index in range(3)]
    for mine, row in zip(first, alone, strict=True):
        torch.testing.assert_close(mine, logits(model, row)[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl", "idefics3"])
def test_rows_are_right_in_any_call_and_those_told_apart_by_positions_alone_only_without_a_cache(name):
    model, processor = build(name)
    collate = packer(name, model, processor)
    expected = torch.cat([logits(model, collate.collator([sample])) for sample in rows()], dim=1)
    close = {"atol": 2e-5, "rtol": 1e-4}
    with torch.no_grad():
        torch.testing.assert_close(model(**collate(rows())).logits, expected, **close)
        batch = packer(name, model, processor, form="positions")(rows())
        # What the documentation warns of. Where this no longer differs, Transformers has learnt it.
        assert not torch.allclose(model(**batch).logits, expected, **close)
        model.config.use_cache = False  # as Transformers' Trainer says it
        model.config.get_text_config(decoder=True).use_cache = False
        torch.testing.assert_close(model(**batch).logits, expected, **close)


def test_rows_are_filled_padded_and_masked():
    assert fill([3, 5, 2, 4], size=8) == [[0, 1], [2, 3]]
    assert fill([4, 4, 4], size=4) == [[0], [1], [2]]
    with pytest.raises(UserError, match="never cut"):
        fill([9], size=8)
    model, processor = build("llava")
    plain = Collator(processor)
    lengths = [int(plain([sample])["input_ids"].shape[1]) for sample in rows(images=False)]
    collate = PackingCollator(plain, form="mask", max_length=max(lengths) + min(lengths))
    batch = collate(rows(images=False))
    assert batch["input_ids"].shape[0] == 2 and batch["attention_mask"].shape == (2, 1, *[batch["input_ids"].shape[1]] * 2)
    found = logits(model, batch)
    assert found.isfinite().all()  # padding sees padding: a row of a softmax without anything would be no number
    batch_loss = next_token_loss(found, batch["labels"])
    padded = plain(rows(images=False))
    torch.testing.assert_close(batch_loss, next_token_loss(logits(model, padded), padded["labels"]), atol=1e-5, rtol=1e-5)
    assert sorted(batch["input_ids"][batch["labels"] != IGNORED]) == sorted(padded["input_ids"][padded["labels"] != IGNORED])


def test_what_cannot_be_packed_is_refused():
    processor = build("qwen2_vl")[1]
    with pytest.raises(UserError, match="get_rope_index"):
        PackingCollator(Collator(processor))(rows())
    assert PackingCollator(Collator(processor))(rows(images=False))["position_ids"].shape[0] == 1
    with pytest.raises(UserError, match="Known: mask, positions"):
        PackingCollator(Collator(processor), form="rows")


def test_a_model_trains_on_packed_documents():
    model, processor = build("llava")
    settings = TrainSettings(steps=1, batch_size=3)
    method = METHODS["finetune_full"](model, settings=settings)
    trainer = Trainer(model, method, PackingCollator(Collator(processor)), settings=settings, folder=None)
    (learnt,) = trainer.learn(Stream(tasks=(Task(name="documents", train=documents(3), test=[]),)))
    assert learnt.cost.optimizer_targets > 100


def test_documents_interleave_several_pictures_with_prose_that_alone_is_learnt():
    made = documents(9, seed=1)
    assert [sample.messages for sample in made] == [sample.messages for sample in documents(9, seed=1)]
    assert [sample.messages for sample in made] != [sample.messages for sample in documents(9, seed=2)]
    processor = build("qwen2_vl")[1]
    collator = Collator(processor)
    for sample in made:
        assert 2 <= len(sample.images) <= 4
        prose = [message.content for message in sample.messages if message.role == "assistant"]
        assert len(prose) == len(sample.images) + 2
        batch = collator([sample])
        learnt = processor.tokenizer.decode(batch["input_ids"][batch["labels"] != IGNORED])
        assert "<|" not in learnt and learnt.replace(" ", "").endswith("".join(prose[1:]).replace(" ", ""))
        text = processor.tokenizer.decode(batch["input_ids"][0])
        places = [text.find(part) for part in prose]
        assert places == sorted(places) and -1 not in places
        assert "<|image_pad|>" in text[places[1] : places[2]] and "<|im_start|>" not in text


def test_sentences_of_documents_are_true():
    flags = documents(1, seed=3)[0]
    told = " ".join(message.content for message in flags.messages)
    countries = [part.split(".")[0] for part in told.split("This is the flag of ")[1:]]
    assert told.startswith("\n" * 0 + told[0]) and all(told.count(country) >= 2 for country in countries)
    (caption,) = captions(1)
    assert len(caption.images) == 1 and caption.answer.startswith("There is ")
    assert all(not sample.images and len(sample.messages) == 1 for sample in texts())


def test_the_default_blend_has_the_ratios_of_mm1():
    blend = pretraining_blend(size=36, seed=2)
    kinds = Counter(sample.id.partition("/")[0] for sample in blend)
    assert {name: kinds[name] / len(blend) for name in RATIOS} == pytest.approx(
        {"captions": 0.45, "documents": 0.45, "text": 0.1}, abs=0.01
    )
    assert set(Counter(sample.id.partition("/")[0] for sample in pretraining_blend(ratios={"captions": 1.0}, size=5))) == {"captions"}
    assert {source.name for source in pretraining_blend(ratios={"captions": 1, "documents": 0}, size=5).sources} == {"captions"}


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ({"caption": 1.0}, "Did you mean 'captions'"),
        ({"captions": -1.0, "text": 1.0}, "ratio of 'captions' is -1.0. A number from 0 up"),
        ({"text": 1.0, "captions": float("nan")}, "ratio of 'captions' is nan. A number from 0 up"),
        ({"captions": float("inf")}, "is inf. A number from 0 up"),
        ({"captions": "1"}, "is '1'. A number from 0 up"),
        ({"captions": None}, "is None. A number from 0 up"),
        ({"captions": 0.0}, r"ratios are \{'captions': 0.0\}. One above 0 is wanted"),
        ({}, "One above 0 is wanted, of captions, documents, text"),
    ],
)
def test_ratios_that_say_nothing_are_refused(ratios, words):
    with pytest.raises(UserError, match=words):
        pretraining_blend(ratios=ratios, size=5)
