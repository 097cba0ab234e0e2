"""WINGS and plain models on the command line."""

from alula.files import read_json, read_jsonl
from test_cli import FAST, alula, done, write_task
from zoo import build


def tiny(folder):
    model, processor = build("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_learn_with_method_wings_keeps_learners_that_answer_and_are_scored(tmp_path):
    model, colours = tiny(tmp_path / "tiny"), write_task(tmp_path / "colours", ["red", "green"])
    pool = tmp_path / "pool"
    done("learn", "--method", "wings", "--task", f"colours={colours}", "--pool", pool, "--model", model, *FAST)
    manifest = read_json(pool / "pool.json")
    assert [entry["name"] for entry in manifest["learners"]] == ["colours"] and manifest["experts"] == []
    assert done("generate", "What colour?", "--pool", pool, "--image", colours.parent / "00.png").output is not None
    done("eval", "--pool", pool, "--task", f"colours={colours}")
    scored = read_jsonl(pool / "evaluation" / "colours.jsonl")
    assert sum(row["score"] for row in scored) / len(scored) == manifest["learners"][0]["about"]["after"]


def test_an_unknown_method_for_a_pool_is_one_line_and_exit_code_2(tmp_path):
    colours = write_task(tmp_path / "colours", ["red", "green"])
    result = alula("learn", "--method", "joint", "--task", f"colours={colours}", "--pool", tmp_path / "pool", *FAST)
    assert result.exit_code == 2 and "routed or wings" in result.output


def test_eval_scores_a_model_without_a_pool(tmp_path):
    model, colours = tiny(tmp_path / "tiny"), write_task(tmp_path / "colours", ["red", "green"])
    done("eval", "--model", model, "--task", f"colours={colours}", "--out", tmp_path / "before")
    assert len(read_jsonl(tmp_path / "before" / "colours.jsonl")) == 1  # the tenth that `learn` would hold out


def test_eval_of_nothing_says_what_to_give(tmp_path):
    result = alula("eval", "--task", "capital")
    assert result.exit_code == 2 and "--pool" in result.output and "--model" in result.output
