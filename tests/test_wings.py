"""WINGS as a method and in a pool: what trains in which stage, at which rate, and what comes back from disk."""

import pytest
import torch

from alula import Collator, Stream, Trainer, TrainSettings, load_task
from alula.errors import UserError
from alula.files import read_jsonl
from alula.methods import METHODS
from alula.models import load_model
from alula.pool import Pool
from alula.running.learn import open_pool
from alula.running.learn_wings import learn_wings
from zoo import build, example_batch

SETTINGS = TrainSettings(steps=4, batch_size=4, learning_rate=1e-2)


def learn(*, folder=None, tasks=("digits",), settings=SETTINGS, **options):
    model, processor = build("llava")
    method = METHODS["wings"](model, settings=settings, rank=2, **options)
    trainer = Trainer(model, method, Collator(processor), settings=settings, folder=folder)
    for _ in trainer.learn(Stream(tasks=tuple(load_task(name, train_size=8, test_size=2) for name in tasks))):
        pass
    return model, processor, method


def changed(model):
    """The parts of the model whose values differ from the untouched one."""
    before = build("llava")[0].state_dict()
    found = set()
    for name, tensor in model.state_dict().items():
        original = name.replace(".self_attn.host.", ".self_attn.")
        if original in before and not torch.equal(before[original], tensor):
            found.add("connector" if "projector" in name else "decoder" if "layers." in name and "vision" not in name else name)
    return found


def test_stage_one_trains_connector_and_visual_learners_alone():
    model, _, method = learn(visual_ratio=1.0)
    moved = {
        path.split(".learners.")[1].split(".")[0] for path, tensor in method.learners.parameters().items() if ".B" in path and tensor.any()
    }
    assert moved == {"image"}
    assert changed(model) == {"connector"}


def test_the_two_stages_share_the_steps_of_one_task(tmp_path):
    learn(folder=tmp_path, visual_ratio=0.5)
    assert [row["stage"] for row in read_jsonl(tmp_path / "losses.jsonl")] == ["visual", "visual", "learners", "learners"]


def test_a_frozen_backbone_and_connector_are_bit_identical_after_training():
    model, _, method = learn(connector=False)
    assert changed(model) == set()
    method.learners.detach()
    before = build("llava")[0].state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_backbone_trains_at_a_rate_of_its_own():
    rate, settings = 1e-5, TrainSettings(steps=1, batch_size=4, learning_rate=1e-2, schedule="constant", warmup_ratio=0.0, weight_decay=0.0)
    model, _, _ = learn(backbone_learning_rate=rate, visual_ratio=0.0, settings=settings)
    before = build("llava")[0].get_parameter("model.language_model.layers.0.self_attn.q_proj.weight")
    after = model.get_parameter("model.language_model.layers.0.self_attn.host.q_proj.weight")
    # the first step of AdamW moves every weight by the rate, whatever its gradient
    torch.testing.assert_close((after - before).abs().max(), torch.tensor(rate), rtol=1e-2, atol=0.0)


def test_a_task_without_images_has_no_stage_one(tmp_path):
    model, _ = build("llava")
    method = METHODS["wings"](model, settings=SETTINGS, rank=2)
    (stage,) = method.stages(load_task("digits", train_size=0, test_size=2))
    assert (stage.name, stage.steps) == ("learners", 4)


def test_text_only_prompts_stay_bit_identical_in_strict_mode():
    model, processor, _ = learn(strict_text=True, connector=False)
    batch = example_batch("llava", processor, text_only=True)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, build("llava")[0](**batch).logits)


def tiny_folder(path):
    model, processor = build("llava")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def test_a_pool_gives_the_trained_learners_back_and_keeps_earlier_ones(tmp_path):
    base = tiny_folder(tmp_path / "base")
    options = {"rank": 2, "router": "mass", "backbone_learning_rate": 1e-3}
    learn_wings(base, tmp_path / "pool", load_task("digits", train_size=8, test_size=2), settings=SETTINGS, options=options)
    first = {path: path.read_bytes() for path in (tmp_path / "pool" / "learners" / "digits").iterdir()}
    learn_wings(None, tmp_path / "pool", load_task("easy_vqa", train_size=8, test_size=2), settings=SETTINGS)
    assert all(path.read_bytes() == content for path, content in first.items())
    opened = open_pool(tmp_path / "pool")
    assert opened.learners.config.router == "mass" and opened.pool.learner_names == ["digits", "easy_vqa"]
    model, processor = load_model(base)
    batch = example_batch("llava", processor)
    with torch.no_grad():
        untouched = model(**batch).logits
        learners = opened.pool.attach_learners(model)
        assert torch.equal(model(**batch).logits, opened.model(**batch).logits)
        assert not torch.equal(model(**batch).logits, untouched)
        learners.detach()
        assert torch.equal(model(**batch).logits, untouched)


def test_learners_for_another_base_are_refused(tmp_path):
    base = tiny_folder(tmp_path / "base")
    learn_wings(base, tmp_path / "pool", load_task("digits", train_size=8, test_size=2), settings=SETTINGS, options={"rank": 2})
    other, _ = build("llava", seed=1)
    with pytest.raises(UserError, match="was made for base model"):
        Pool.open(tmp_path / "pool").attach_learners(other)


def test_a_damaged_file_of_learners_is_refused(tmp_path):
    base = tiny_folder(tmp_path / "base")
    learn_wings(base, tmp_path / "pool", load_task("digits", train_size=8, test_size=2), settings=SETTINGS, options={"rank": 2})
    path = tmp_path / "pool" / "learners" / "digits" / "learners.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="is missing or not what was saved"):
        Pool.open(tmp_path / "pool").attach_learners(load_model(base)[0])
