"""A run folder goes on with more methods, seeds and orders; whatever else changes is another run, and the first change is named."""

import pytest

from alula.config import check_recipe, read_recipe
from alula.errors import UserError
from alula.files import write_text
from alula.running.cells import list_cells
from alula.running.run import start_folder

ORDERS = [["easy_vqa", "digits"], ["digits", "easy_vqa"]]
ROUTED = {"name": "routed", "options": {"rank": 2}, "with": [{"name": "soft_targets", "options": {"alpha": 0.1}}]}
RAW = {"tasks": ["easy_vqa", "digits"], "base_tasks": ["capital"], "methods": ["finetune", ROUTED], "seeds": [0, 1], "train": {"steps": 2}}


def cells(recipe, folder):
    """What each cell is, by its name."""
    return {cell.name: (cell.folder, cell.identity, cell.settings, cell.joint, cell.additions) for cell in list_cells(recipe, folder)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {}),
        ({}, {"methods": ["lora", ROUTED, "finetune"]}),
        ({}, {"seeds": [2, 1, 0]}),
        ({}, {"orders": ORDERS}),
        ({"orders": ORDERS[:1]}, {"orders": ORDERS}),
        ({"orders": ORDERS, "methods": [{"name": "finetune", "orders": [1]}]}, {"orders": ORDERS}),
        ({"methods": [{"name": "finetune", "joint": True}]}, {"orders": ORDERS, "methods": [{"name": "finetune", "joint": True}]}),
        ({}, {"orders": ORDERS, "seeds": [0, 1, 5], "methods": ["finetune", ROUTED, "joint"]}),
    ],
)
def test_methods_seeds_and_orders_are_added_and_every_cell_stays_what_it_is(before, after, tmp_path):
    kept, grown = (check_recipe({**RAW, **changes}) for changes in (before, after))
    start_folder(kept, tmp_path)
    start_folder(grown, tmp_path)
    assert read_recipe(tmp_path / "recipe.yaml") == grown
    assert cells(kept, tmp_path).items() <= cells(grown, tmp_path).items()


@pytest.mark.parametrize(
    ("before", "after", "change"),
    [
        ({}, {"train": {"steps": 3}}, "train.steps was 2, is 3"),
        ({}, {"methods": [ROUTED]}, "methods.finetune is missing"),
        ({}, {"methods": ["finetune", {**ROUTED, "options": {"rank": 3}}]}, "methods.routed.options.rank was 2, is 3"),
        ({}, {"methods": [{"name": "finetune", "options": {"rank": 3}}, ROUTED]}, "methods.finetune.options.rank was not given, is 3"),
        ({}, {"methods": [{"name": "finetune", "joint": True}, ROUTED]}, "methods.finetune.joint was False, is True"),
        ({}, {"methods": ["finetune", {**ROUTED, "with": ["soft_targets"]}]}, "methods.routed.with.0.options.alpha was 0.1, is not given"),
        ({}, {"methods": ["finetune", {**ROUTED, "with": []}]}, "methods.routed.with was [{"),
        ({}, {"seeds": [1, 2]}, "seeds lacks 0"),
        ({}, {"orders": ORDERS[::-1]}, "orders.0.0 was easy_vqa, is digits"),
        ({"orders": ORDERS}, {}, "orders was [["),
        ({"orders": ORDERS}, {"orders": ORDERS, "methods": ["finetune", {**ROUTED, "orders": [1]}]}, "methods.routed.orders lacks 0"),
        ({}, {"tasks": ["easy_vqa", {"name": "digits", "test_size": 9}]}, "tasks.1.test_size was None, is 9"),
        ({}, {"base_tasks": ["capital", "prose"], "train": {"steps": 3}}, "base_tasks was [{"),
        ({}, {"model": "elsewhere", "seeds": [1], "train": {"steps": 3}}, "model was smol, is elsewhere"),
    ],
)
def test_whatever_else_changes_is_refused_with_the_first_key_that_differs(before, after, change, tmp_path):
    start_folder(check_recipe({**RAW, **before}), tmp_path)
    kept = (tmp_path / "recipe.yaml").read_text()
    with pytest.raises(UserError) as refused:
        start_folder(check_recipe({**RAW, **after}), tmp_path)
    assert f"(see {tmp_path / 'recipe.yaml'}): {change}" in str(refused.value)
    assert (tmp_path / "recipe.yaml").read_text() == kept


def test_finished_cells_without_their_recipe_get_no_other_one(tmp_path):
    write_text(tmp_path / "cells" / "finetune-seed0" / "done.json", "{}")
    with pytest.raises(UserError, match=r"holds finished cells, but no recipe.yaml"):
        start_folder(check_recipe(RAW), tmp_path)
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_damaged_recipe_is_not_written_over(tmp_path):
    write_text(tmp_path / "recipe.yaml", "tasks: [")
    with pytest.raises(UserError, match="not valid YAML"):
        start_folder(check_recipe(RAW), tmp_path)
