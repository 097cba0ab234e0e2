"""Scores change with the prompt: what the chat template wrote is kept as a hash, shown, and scores of other prompts are not compared."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from alula import Collator, Task
from alula.cli.app import app
from alula.data.sample import Sample
from alula.evaluation.evaluate import evaluate_task
from alula.evaluation.prompts import prompt_hashes, with_prompt_hashes
from alula.evaluation.scores import Prediction, hash_of, score_task
from alula.files import read_json, read_jsonl, write_jsonl
from alula.pool import Pool
from alula.report import build_report
from alula.report.comparison import build_comparison
from alula.report.pool_page import build_pool_report
from alula.running.run import run_recipe
from html_page import Page
from resume_worker import pictures
from run_folder import write_run
from taught_pool import taught_pool
from tiny_runs import LORA, recipe, save_tiny
from zoo import build


def rewritten(processor):
    """The same processor with two words more in its chat template."""
    processor.chat_template = "be brief\n" + processor.chat_template
    return processor


@pytest.fixture(scope="module")
def processor():
    return build("llava")[1]


def test_a_hash_is_of_what_the_processor_gives_for_the_prompt(processor):
    sample = Sample.ask("which colour?", "red")
    (found,) = prompt_hashes(processor, [sample], with_answers=False)
    content = [{"type": "text", "text": "which colour?"}]
    written = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    assert found == hash_of(written)


@pytest.mark.parametrize("with_answers", [False, True])
def test_another_template_or_an_image_is_another_hash(processor, with_answers):
    plain, shown = Sample.ask("which colour?", "red"), pictures("which colour?", 1)[0]
    kept = prompt_hashes(processor, [plain, shown], with_answers=with_answers)
    assert kept[0] != kept[1]
    changed = prompt_hashes(rewritten(build("llava")[1]), [plain, shown], with_answers=with_answers)
    assert all(one != other for one, other in zip(kept, changed, strict=True))


def test_options_and_prose_are_hashed_with_what_follows_the_prompt(processor):
    samples = [Sample.ask("which colour?", answer) for answer in ("red", "blue")]
    assert len(set(prompt_hashes(processor, samples, with_answers=False))) == 1
    assert len(set(prompt_hashes(processor, samples, with_answers=True))) == 2


def test_the_hash_of_a_task_knows_no_order_and_is_empty_where_one_prompt_is_unknown():
    rows = [Prediction(id=str(i), task="t", prompt="", reference="", output="", score=1.0, prompt_hash=hash_of(str(i))) for i in range(3)]
    task = Task(name="t", train=[], test=[])
    found = score_task(task, rows).prompt_hash
    assert found and found == score_task(task, rows[::-1]).prompt_hash != score_task(task, rows[:2]).prompt_hash
    assert score_task(task, [*rows, replace(rows[0], prompt_hash="")]).prompt_hash == ""


def test_predictions_carry_their_hash_and_old_ones_are_as_they_were(processor):
    model, _ = build("llava")
    task = Task(name="colours", train=[], test=pictures("colour", 3), max_new_tokens=1)
    found = evaluate_task(model, Collator(processor), task, batch_size=2, limit=2)
    marked = with_prompt_hashes(found, task, processor)
    assert [one.prompt_hash for one in marked] == prompt_hashes(processor, task.test[:2], with_answers=False)
    assert [{key: value for key, value in one.as_row().items() if key != "prompt_hash"} for one in marked] == [
        replace(one, prompt_hash="").as_row() for one in marked
    ]


def test_a_run_keeps_the_hash_of_each_task_and_the_report_shows_it(tmp_path):
    run = tmp_path / "run"
    assert run_recipe(recipe(save_tiny(tmp_path / "tiny"), methods=[LORA], orders=[]), run, say=lambda line: None, fail_fast=True) == 0
    rows = read_jsonl(run / "cells" / "finetune-seed0" / "scores.jsonl")
    hashes = {task: {row["prompt_hash"] for row in rows if row["task"] == task} for task in ("easy_vqa", "digits", "capital")}
    assert all(len(found) == 1 and len(next(iter(found))) == 32 for found in hashes.values()) and len(set(map(str, hashes.values()))) == 3
    text = Page(build_report(run).read_text(encoding="utf-8")).text
    for task, (found,) in hashes.items():
        assert f"prompts of {task} (SHA-256): {found[:12]}" in text


def test_a_run_whose_prompts_changed_on_the_way_says_so_and_one_without_hashes_says_nothing(tmp_path):
    run = write_run(tmp_path / "run", seeds=1, with_failures=False)
    text = Page(build_report(run).read_text(encoding="utf-8")).text
    assert "prompts of" not in text and "(SHA-256)" not in text
    scores = run / "cells" / "finetune-seed0" / "scores.jsonl"
    rows = [{**row, "prompt_hash": hash_of("new" if row["row"] > 1 and row["task"] == "digits" else "old")} for row in read_jsonl(scores)]
    write_jsonl(scores, rows)
    text = Page(build_report(run).read_text(encoding="utf-8")).text
    assert "digits was asked with 2 different sets of prompts" in text and "animals was asked" not in text
    assert f"prompts of digits (SHA-256): {hash_of('old')[:12]}, {hash_of('new')[:12]}" in text
    page = Page(build_comparison(run).read_text(encoding="utf-8")).text
    assert "digits was asked with 2 different sets of prompts" in page and "Prompts " in page and "(SHA-256), 7 tasks" in page


def rows_for(hashes):
    return [
        Prediction(id=f"t/{i}", task="t", prompt=f"Question {i}?", reference="a", output="a", score=1.0, prompt_hash=one).as_row()
        for i, one in enumerate(hashes)
    ]


@pytest.mark.parametrize(("tuned", "code"), [("ab", 0), ("ac", 2), ("  ", 0)], ids=["same", "other", "unknown"])
def test_gate_compares_only_what_was_asked_in_the_same_way(tmp_path, tuned, code):
    """An old folder has no hashes and is taken on trust."""
    for name, letters in (("base", "ab"), ("tuned", tuned)):
        write_jsonl(tmp_path / name / "t.jsonl", rows_for([hash_of(letter) if letter.strip() else "" for letter in letters]))
    result = CliRunner().invoke(app, ["gate", str(tmp_path / "base"), str(tmp_path / "tuned")])
    assert result.exit_code == code, result.output
    if code:
        said = " ".join(result.output.split())
        assert "sample 't/1'" in said and "the chat templates differ" in said and "Give both models the same processor" in said


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    found = taught_pool(folder)
    rows = [{"question": f"{number}: which colour?", "answer": ("red", "blue")[number % 2]} for number in range(4)]
    (folder / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, processor = build("llava")
    model.save_pretrained(folder / "rewritten")
    rewritten(processor).save_pretrained(folder / "rewritten")
    return folder, found


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_an_evaluation_with_another_template_is_kept_apart_by_gate_and_by_the_page_of_the_pool(taught, tmp_path):
    folder, found = taught
    ask = ("eval", "--task", f"words={folder / 'words.jsonl'}")
    results = [run(*ask, "--model", folder / name, "--out", tmp_path / name) for name in ("model", "rewritten")]
    assert [result.exit_code for result in results] == [0, 0], [result.output for result in results]
    result = run("gate", tmp_path / "model", tmp_path / "rewritten")
    assert result.exit_code == 2 and "the chat templates differ" in " ".join(result.output.split())
    pool = Pool.open(found.pool)
    for moment, name in (("before.jsonl", "model"), ("predictions.jsonl", "rewritten")):
        write_jsonl(pool.folder / "experts" / "words" / moment, read_jsonl(tmp_path / name / "words.jsonl"))
    write_jsonl(pool.folder / "evaluation" / "words.jsonl", read_jsonl(tmp_path / "rewritten" / "words.jsonl"))
    text = Page(build_pool_report(pool.folder).read_text(encoding="utf-8")).text
    assert text.count("asked with another chat template") == 1
    assert "Prompts now (SHA-256) words " in text


def test_diagnose_refuses_a_tuned_model_with_another_template(taught, tmp_path):
    folder, _ = taught
    rows = [{"question": "which colour?", "answer": "red", "image": "red.png"}]
    pictures("a", 1)[0].images[0].save(folder / "red.png")
    (folder / "shown.jsonl").write_text(json.dumps(rows[0]) + "\n")
    ask = ("diagnose", folder / "model", "--data", folder / "shown.jsonl", "--tuned")
    refused = run(*ask, folder / "rewritten", "--out", tmp_path / "refused")
    assert refused.exit_code == 2 and "their chat templates differ" in " ".join(refused.output.split())
    assert run(*ask, folder / "model", "--out", tmp_path / "same").exit_code == 0
    assert len({row["prompt_hash"] for row in read_json(tmp_path / "same" / "attention_shift.json")}) == 1
