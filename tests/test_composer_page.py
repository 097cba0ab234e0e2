"""What docs/composer.md, docs/few_shot.md and the decoder part of docs/pretraining.md claim: their code runs, on tiny models."""

import re

import pytest
import torch
import yaml

from alula.config import check_recipe
from alula.models import load_model
from alula.running.cells import check_methods
from alula.running.grid import read_grid
from alula.running.run import run_recipe
from composed_models import save_backbone
from test_docs import ROOT, blocks, shortened
from tiny_runs import save_tiny

DOCS = ROOT / "docs"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working folder with a tiny causal LM and a tiny vision-language model."""
    save_backbone(tmp_path / "lm", hidden_size=48)  # the page's deformable connector has three heads
    save_tiny(tmp_path / "vlm")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_tiny_models(code):
    return shortened(code).replace('compose("smol"', 'compose("lm"').replace('load_model("smol")', 'load_model("vlm")')


def run(code, space, *, name):
    exec(compile(on_tiny_models(code), name, "exec"), space)
    return space


def test_the_composers_python_runs_from_top_to_bottom(desk):
    asked = {"model": "vlm", "tasks": [{"name": "digits", "train_size": 4, "test_size": 2}], "methods": ["finetune_full"]}
    training = {"train": {"steps": 1, "batch_size": 2, "learning_rate": 0.1}, "evaluation": {"base_row": False}}
    assert run_recipe(check_recipe(asked | training), desk / "runs" / "mine", say=lambda line: None) == 0
    space: dict = {}
    for number, code in enumerate(blocks(DOCS / "composer.md", "python"), start=1):
        run(code, space, name=f"composer.md, block {number}")
        if number == 2:
            trained = {name.partition(".")[0] for name, value in space["model"].named_parameters() if value.requires_grad}
            assert trained == {"vision_tower", "connector"} and len(space["new"]) > 0
    assert (desk / "my-adapters" / "adapters.json").exists()
    assert type(load_model("my-vlm", device="cpu")[0]).__name__ == "ComposedVLM"
    left, before = (dict(load_model(name, device="cpu")[0].named_parameters()) for name in ("my-trained-vlm", "vlm"))
    moved = {name for name, value in left.items() if not torch.equal(value, before[name])}
    assert moved and all(torch.equal(left[name], space["trained"][name]) for name in moved)


def test_the_composers_recipes_and_grid_are_read(desk):
    text = [
        block.replace("weights: smol", "image_size: 128").replace("backbone: smol", "backbone: lm")
        for block in blocks(DOCS / "composer.md", "yaml")
    ]
    grids = [block for block in text if yaml.safe_load(block).get("grid")]
    for block in text:
        if block not in grids:
            check_methods(check_recipe({"tasks": ["digits"], "methods": ["finetune_full"], **yaml.safe_load(block)}))
    counts = []
    for block in grids:
        raw = {"methods": ["finetune_full"], **yaml.safe_load(re.sub(r"image_size: 128, image_size: 192", "image_size: 192", block))}
        (desk / "grid.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
        counts.append(len(read_grid("grid.yaml").points))
    assert counts == [4, 3]


def test_the_few_shot_pages_python_runs(desk, capsys):
    (code,) = blocks(DOCS / "few_shot.md", "python")
    space = run(code, {}, name="few_shot.md")
    assert "4 for 8" in capsys.readouterr().out
    assert len(space["predictions"]) == 8


def test_the_decoder_part_of_the_pretraining_page_runs(desk):
    code = next(block for block in blocks(DOCS / "pretraining.md", "python") if "upcycle(model" in block)
    space = run(code, {"model": load_model("vlm", device="cpu")[0]}, name="pretraining.md")
    with torch.no_grad():
        assert space["model"](input_ids=torch.arange(5)[None] + 40).logits.isfinite().all()
