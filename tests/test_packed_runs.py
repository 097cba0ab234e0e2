"""Claims about packed training in runs: it learns what padded rows teach, and is refused where samples would see one another."""

import pytest
import torch

from alula.data import packing
from alula.data.collate import Collator
from alula.errors import UserError
from alula.files import read_jsonl
from alula.running.cells import list_cells
from alula.running.packed import packing_collator
from alula.running.run import run_recipe
from test_packing import rows
from tiny_runs import LORA, recipe, save_tiny
from zoo import build

METHODS = [{"name": "finetune_full", "train": {"learning_rate": 1e-3}}, LORA]
ONE = [{"name": "easy_vqa", "train_size": 6, "test_size": 2}]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Rows of losses.jsonl of both methods, with padded rows and with packed ones."""
    folder = tmp_path_factory.mktemp("packed")
    tiny, found = save_tiny(folder / "tiny"), {}
    for pack in (None, 256):
        made = recipe(tiny, tasks=ONE, base_tasks=[], orders=[], methods=METHODS, train={"steps": 2, "batch_size": 6, "pack": pack})
        run_recipe(made, folder / f"{pack}", say=lambda line: None, fail_fast=True)
        found[pack] = [read_jsonl(folder / f"{pack}/cells/{name}-seed0/losses.jsonl") for name in ("finetune_full", "finetune")]
    return found


def test_packed_rows_teach_what_padded_rows_teach(losses):
    for padded, packed in zip(losses[None], losses[256], strict=True):
        for one, other in zip(padded, packed, strict=True):
            assert (one["step"], one["targets"]) == (other["step"], other["targets"])
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
            assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("name", ["routed", "moe_lora", "prefix", "wings", "mome"])
def test_methods_to_which_a_row_is_a_sample_are_refused_before_anything_runs(name, tmp_path):
    with pytest.raises(UserError, match="to which each row is one sample"):
        list_cells(recipe(tmp_path, orders=[], methods=[name], train={"pack": 512}), tmp_path)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3"])
def test_models_that_keep_samples_apart_are_packed(name):
    model, processor = build(name)
    batch = packing_collator(model, Collator(processor), rows(), max_length=600)(rows())
    assert batch["input_ids"].shape[0] == 1
    with torch.no_grad():
        assert model(**batch, use_cache=False).loss.isfinite()


@pytest.mark.parametrize(("name", "words"), [("mllama", "takes no packed rows|change one another"), ("qwen3_5", "change one another")])
def test_models_that_cannot_keep_samples_apart_are_refused(name, words):
    model, processor = build(name)
    with pytest.raises(UserError, match=words):
        packing_collator(model, Collator(processor), rows(images=name == "mllama"), max_length=600)


def test_a_mask_that_lets_samples_see_one_another_is_found_out(monkeypatch):
    def causal(owner):
        rows, tokens = owner.shape
        return torch.ones(rows, 1, tokens, tokens, dtype=torch.bool).tril()

    monkeypatch.setattr(packing, "block_mask", causal)
    model, processor = build("llava")
    with pytest.raises(UserError, match="change one another"):
        packing_collator(model, Collator(processor), rows(), max_length=600)


def test_a_sample_longer_than_a_row_is_refused_not_cut():
    model, processor = build("llava")
    with pytest.raises(UserError, match="never cut"):
        packing_collator(model, Collator(processor), rows(), max_length=8)(rows())
