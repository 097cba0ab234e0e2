"""Claims about MM1's kinds of data in recipes: sources of a blend, held-out prose in bits, questions asked with and without examples."""

import pytest

from alula.data.choices import TaskChoice, read_choice
from alula.errors import UserError
from alula.files import read_jsonl
from alula.running.run import run_recipe
from tiny_runs import recipe, save_tiny

KINDS = ("captions", "documents", "text")
PAGES = {
    "name": "pages",
    "scoring": "bits_per_byte",
    "blend": [{"name": f"pretraining/{kind}", "ratio": 1, "cap": 6} for kind in KINDS],
    "test_size": 3,
}


def test_a_recipe_blends_the_kinds_and_holds_out_prose_of_each():
    task = read_choice(TaskChoice(**PAGES))
    assert sorted({sample.id.partition("/")[0] for sample in task.train}) == list(KINDS) and len(task.train) == 18
    assert [sum(sample.id.startswith(kind) for sample in task.test) for kind in KINDS] == [30, 30, 30]
    assert not {sample.messages for sample in task.train} & {sample.messages for sample in task.test}
    with pytest.raises(UserError, match=r"Unknown kind of data 'document'.*Did you mean 'documents'"):
        read_choice(TaskChoice(**PAGES | {"blend": [{"name": "pretraining/document"}]}))


def test_packed_pages_teach_everything_and_answers_are_scored_with_and_without_examples(tmp_path):
    made = recipe(
        save_tiny(tmp_path / "tiny"),
        tasks=[PAGES],
        base_tasks=[{"name": "easy_vqa", "train_size": 6, "test_size": 2}],
        orders=[],
        methods=[{"name": "finetune_full", "options": {"connector": True, "encoder": True}}],
        train={"steps": 1, "batch_size": 3, "pack": 1024},
        evaluation={"shots": [0, 2], "shots_as": "caption"},
    )
    assert run_recipe(made, tmp_path / "run", say=lambda line: None, fail_fast=True) == 0
    rows = read_jsonl(tmp_path / "run/cells/finetune_full-seed0/scores.jsonl")
    assert {row["task"]: row["metric"] for row in rows if row["row"] == 1} == {
        "pages": "bits_per_byte",
        **dict.fromkeys(("easy_vqa", "0shot_easy_vqa", "2shot_easy_vqa"), "exact_match"),
    }
