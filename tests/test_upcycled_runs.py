"""Claims about sparse decoders in runs: named in a recipe or loaded from a folder, balanced while they train, shown in the report."""

import pytest
import torch
import yaml
from typer.testing import CliRunner

from alula import anatomy, load_model
from alula.cli.app import app
from alula.data.collate import Collator
from alula.data.sample import Sample
from alula.errors import UserError
from alula.experts.sparse_ffn import is_sparse
from alula.experts.upcycling import CONFIG, upcycle
from alula.files import read_json, read_jsonl, write_json
from alula.models.composition import compose, plan_composition
from alula.models.loading import CHANGED_CLASSES
from alula.report.build import build_report
from alula.running.choices import load_chosen
from alula.running.grid import read_grid
from alula.running.run import run_recipe
from composed_models import VIT, save_backbone
from html_page import Page
from tiny_runs import recipe, save_tiny

UPCYCLE = {"experts": 3, "every": 2, "top_k": 2, "capacity": 1.0}
FULL = [{"name": "finetune_full"}]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with a tiny dense model, a run of its sparse form, and the sparse form saved as it began."""
    folder = tmp_path_factory.mktemp("sparse")
    tiny = save_tiny(folder / "tiny")
    made = recipe(tiny, model={"backbone": str(tiny), "upcycle": UPCYCLE}, methods=FULL, orders=[], evaluation={"shots": 0})
    assert run_recipe(made, folder / "run", say=lambda line: None, fail_fast=True) == 0
    model, processor = load_chosen(made, device="cpu")
    model.save_pretrained(folder / "moe")
    processor.save_pretrained(folder / "moe")
    return folder


def cell_of(folder, name="finetune_full-seed0"):
    return folder / "cells" / name


def test_a_recipe_trains_a_sparse_decoder_with_its_balance_losses_and_scores_it(desk):
    rows = read_jsonl(cell_of(desk / "run") / "losses.jsonl")
    assert [set(row["parts"]) for row in rows] == [{"next_token", "load_balance", "router_z"}] * 2
    assert all(row["parts"]["load_balance"] >= 0.0099 for row in rows)  # 0.01 where the load is even, more elsewhere
    scores = read_jsonl(cell_of(desk / "run") / "scores.jsonl")
    assert {(row["row"], row["task"]) for row in scores} >= {(row, task) for row in range(3) for task in ("easy_vqa", "digits", "capital")}


def test_a_folder_of_a_sparse_model_is_loaded_trained_and_scored_as_any_other(desk, tmp_path):
    loaded, processor = load_model(desk / "moe", device="cpu")
    assert is_sparse(loaded) and getattr(loaded.config, CONFIG) == UPCYCLE
    model, _ = load_chosen(recipe(desk / "tiny", model={"backbone": str(desk / "tiny"), "upcycle": UPCYCLE}), device="cpu")
    batch = Collator(processor)([Sample.ask("what colour?", "red")])
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    own = [{**FULL[0], "with": [{"name": "balance", "options": {"load_balance": 5.0}}]}]
    one = [{"name": "digits", "train_size": 4, "test_size": 2}]
    again = recipe(desk / "moe", tasks=one, base_tasks=[], orders=[], methods=own)
    run_recipe(again, tmp_path / "run", say=lambda line: None, fail_fast=True)
    (row,) = read_jsonl(cell_of(tmp_path / "run") / "losses.jsonl")
    assert row["parts"]["load_balance"] >= 4.95  # the recipe's weight, not the default beside it
    result = CliRunner().invoke(
        app, ["eval", "--model", str(desk / "moe"), "--task", "digits", "--limit", "2", "--out", str(tmp_path / "e")]
    )
    assert result.exit_code == 0, result.output
    assert len(read_jsonl(tmp_path / "e" / "digits.jsonl")) == 2


def test_low_rank_training_which_leaves_the_gates_alone_gets_no_balance_losses(desk, tmp_path):
    lora = [{"name": "finetune", "options": {"rank": 2, "layers": [1]}}]
    made = recipe(desk / "moe", tasks=[{"name": "digits", "train_size": 4, "test_size": 2}], base_tasks=[], orders=[], methods=lora)
    run_recipe(made, tmp_path / "run", say=lambda line: None, fail_fast=True)
    (row,) = read_jsonl(cell_of(tmp_path / "run", "finetune-seed0") / "losses.jsonl")
    assert "parts" not in row
    model, _ = load_model(desk / "moe", device="cpu")
    assert {path.rpartition(".")[2] for path in anatomy(model).linears(model, layers=[1])} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_the_report_shows_how_the_experts_share_the_tokens(desk):
    found = read_json(cell_of(desk / "run") / "sparse.json")
    assert (found["experts"], found["tasks"], len(found["layers"])) == (3, ["easy_vqa", "digits"], 2)
    torch.testing.assert_close(torch.tensor(found["load"]).sum(-1), torch.ones(2, 2))
    assert any(value > 0 for task in found["dropped"] for value in task)  # capacity 1: less than two choices for each token
    page = Page(build_report(desk / "run").read_text())
    assert "How sparse experts share the tokens" in page.text
    assert "3 experts, 2 for each token, 1 cell" in page.text
    assert "0shot_easy_vqa" in page.text


def test_a_damaged_file_of_shares_is_named_and_loses_no_report(desk, tmp_path):
    path = cell_of(desk / "run") / "sparse.json"
    good = read_json(path)
    write_json(path, {**good, "load": good["load"][0]})
    text = Page(build_report(desk / "run", out=tmp_path / "r.html").read_text()).text
    write_json(path, good)
    assert "sparse.json: shares of tasks x layers x experts are wanted" in text


def test_sparse_or_dense_can_be_a_factor_of_a_grid(desk, tmp_path):
    raw = {
        "model": {"backbone": str(desk / "tiny")},
        "tasks": ["digits"],
        "methods": FULL,
        "grid": {"factors": {"decoder": {"dense": {"model.upcycle": None}, "sparse": {"model.upcycle": UPCYCLE}}}},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(raw))
    dense, sparse = read_grid(tmp_path / "grid.yaml").points
    assert (dense.label, dense.recipe.model.upcycle) == ("dense", None)
    assert (sparse.label, sparse.recipe.model.upcycle) == ("sparse", UPCYCLE)


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """The folders of a tiny causal LM, and of a sparse model composed around it, with that model's logits."""
    folder = tmp_path_factory.mktemp("composed")
    torch.manual_seed(0)
    model, processor = compose(save_backbone(folder / "lm"), VIT)
    upcycle(model, experts=2, every=1)
    model.save_pretrained(folder / "moe")
    processor.save_pretrained(folder / "moe")
    with torch.no_grad():
        return folder, model(input_ids=torch.arange(6)[None] + 20).logits


def test_a_sparse_model_out_of_parts_is_loaded_too_and_is_no_backbone(composed):
    folder, logits = composed
    model, _ = load_model(folder / "moe", device="cpu")
    assert is_sparse(model) and type(model).__name__ == "ComposedVLM"
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(6)[None] + 20).logits, logits)
    with pytest.raises(UserError, match="a composition takes dense ones"):
        plan_composition(folder / "moe", VIT)


def test_a_model_changed_by_what_is_not_imported_is_refused_not_loaded_half(desk, monkeypatch):
    monkeypatch.setattr(CHANGED_CLASSES, "_entries", {})
    with pytest.raises(UserError, match=r"import alula\.experts"):
        load_model(desk / "moe")
