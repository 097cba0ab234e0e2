"""Claims about few-shot scores of runs and grids: tasks of their own, the same shots in every cell, counted by no other measure."""

import numpy as np
import pytest
import yaml

from alula.config import check_recipe
from alula.data.collate import Collator
from alula.data.interleaved.embedding import tf_idf
from alula.data.stream import Stream
from alula.data.tasks import load_task
from alula.errors import UserError
from alula.evaluation.few_shot import WAYS, few_shot
from alula.files import read_json, read_jsonl
from alula.report.build import build_report
from alula.report.findings import write_findings
from alula.report.grid_folder import read_ablation
from alula.report.outcomes import outcomes_of
from alula.running.ablate import run_grid
from alula.running.choices import load_stream
from alula.running.grid import read_grid
from alula.running.run import run_recipe
from alula.running.shots import ask_with_shots
from html_page import Page
from tiny_runs import LORA, recipe, save_tiny
from zoo import build

TASKS = [{"name": "easy_vqa", "train_size": 8, "test_size": 3}, {"name": "digits", "train_size": 8, "test_size": 3}]
QUICK = {"steps": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run with 0 and 2 shots: two tasks and a base task, two seeds."""
    folder = tmp_path_factory.mktemp("shots")
    made = recipe(
        save_tiny(folder / "tiny"),
        tasks=TASKS,
        base_tasks=[{"name": "capital", "test_size": 3}],
        orders=[],
        methods=[LORA],
        seeds=[0, 1],
        train=QUICK,
        evaluation={"shots": [0, 2], "future_tasks": False, "base_every_task": False},
    )
    assert run_recipe(made, folder / "run", say=lambda line: None, fail_fast=True) == 0
    return folder / "run"


def lines(folder, row, task, seed=0):
    return read_jsonl(folder / f"cells/finetune-seed{seed}/predictions/row{row:02d}/default/{task}.jsonl")


def test_each_task_is_scored_again_with_solved_examples_before_its_questions(ran):
    rows = read_jsonl(ran / "cells/finetune-seed0/scores.jsonl")
    assert [row["task"] for row in rows if row["row"] == 0] == [
        *("easy_vqa", "digits", "capital"),
        *(f"{shots}shot_{name}" for name in ("easy_vqa", "digits", "capital") for shots in (0, 2)),
    ]
    # later tasks and base tasks are scored when their plain forms are
    assert {row["task"] for row in rows if row["row"] == 1} == {"easy_vqa", "0shot_easy_vqa", "2shot_easy_vqa"}
    given = {row["task"]: (row["shots"], row["shots_given"]) for row in rows if "shots" in row}
    assert given["2shot_digits"] == (2, 2.0) and given["0shot_capital"] == (0, 0.0)
    plain, shots = lines(ran, 2, "digits"), lines(ran, 2, "2shot_digits")
    for one, other in zip(plain, shots, strict=True):
        assert other["prompt"].endswith(one["prompt"]) and other["prompt"].count("<image>") == 3
        assert (other["id"], other["reference"], other["task"]) == (one["id"], one["reference"], "2shot_digits")


def test_without_examples_nothing_is_measured_again(ran):
    for row in (0, 2):
        assert [{**line, "task": "digits"} for line in lines(ran, row, "0shot_digits")] == lines(ran, row, "digits")


def test_every_cell_sees_the_same_shots(ran):
    first, second = (lines(ran, 2, "2shot_easy_vqa", seed=seed) for seed in (0, 1))
    assert [line["prompt"] for line in first] == [line["prompt"] for line in second]


def test_a_run_chooses_similar_shots_where_its_recipe_says_so(monkeypatch):
    model, processor = build("llava")
    stream, collator = Stream(tasks=(load_task("easy_vqa", train_size=40, test_size=3),)), Collator(processor)
    monkeypatch.setattr("alula.running.shots.load_embedder", {"minilm": tf_idf}.get)
    found = {by: ask_with_shots(stream, model, collator, shots=[1], by=by)["1shot_easy_vqa"].task.test for by in WAYS}
    wanted = few_shot(stream.tasks[0], shots=1, by="similarity", embed=tf_idf).task.test
    assert list(found["similarity"]) == list(wanted) != list(found["seed"])


def test_the_report_shows_them_and_no_measure_counts_them(ran):
    rows = read_jsonl(ran / "cells/finetune-seed0/scores.jsonl")
    assert all(row["is_base"] and row["is_probe"] for row in rows if "shots" in row)
    text = Page(build_report(ran).read_text()).text
    assert "2shot_capital" in text and "Examples in prompts 0, 2" in text
    assert "Base tasks capital" in text and "Base tasks capital, " not in text


def test_what_a_recipe_names_as_a_base_task_is_one_whatever_it_is_elsewhere(tmp_path):
    stream = load_stream(recipe(tmp_path, base_tasks=[{"name": "animals", "train_size": 1, "test_size": 1}]))
    assert [task.is_base for task in (*stream.tasks, *stream.base_tasks)] == [False, False, True]


def test_a_recipe_takes_one_number_and_refuses_what_is_none():
    raw = {"tasks": ["digits"], "methods": ["finetune"]}
    assert check_recipe({**raw, "evaluation": {"shots": 4}}).evaluation.shots == [4]
    for shots, words in ((-1, "greater than or equal to 0"), ([4, 4], "comes twice"), ("many", "list")):
        with pytest.raises(UserError, match=words):
            check_recipe({**raw, "evaluation": {"shots": shots}})


@pytest.fixture(scope="module")
def grid(ran, tmp_path_factory):
    """A grid about few-shot scores, run, with the path of its recipe."""
    folder = tmp_path_factory.mktemp("grid")
    raw = {
        "model": str(ran.parent / "tiny"),
        "tasks": TASKS,
        "methods": [{**LORA, "joint": True}],
        "train": QUICK,
        "evaluation": {"shots": [0, 2], "shots_as": "vqa", "future_tasks": False},
        "grid": {"factors": {"train.learning_rate": [0.001, 0.1]}, "outcome": "2shot"},
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(raw))
    run_grid(read_grid(folder / "grid.yaml"), folder / "run", say=lambda line: None, fail_fast=True)
    return folder


def test_a_grid_can_be_about_few_shot_scores(grid):
    ablation = read_ablation(grid / "run")
    outcomes = {one.name: one for one in outcomes_of(ablation)}
    # the outcome that the grid names comes first, and is the mean over the tasks
    assert list(outcomes)[:3] == ["2shot", "2shot_easy_vqa", "2shot_digits"] and {"average score", "0shot"} <= set(outcomes)
    scores = [row for point in ablation.whole for cell in point.cells for row in cell.scores if row["row"] == 1]
    wanted = np.mean([row["score"] for row in scores if row["task"].startswith("2shot_")])
    assert outcomes["2shot"].grand == pytest.approx(100 * wanted)
    assert "2shot" in str(write_findings(ablation, list(outcomes.values()))[0])
    assert read_json(grid / "run" / "grid.json")["outcome"] == ["2shot"]


def test_a_grid_in_bits_is_about_their_mean_too(grid, tmp_path):
    raw = yaml.safe_load((grid / "grid.yaml").read_text())
    tasks = [{**task, "scoring": "bits_per_byte"} for task in raw["tasks"]]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**raw, "tasks": tasks}))
    run_grid(read_grid(tmp_path / "grid.yaml"), tmp_path / "run", say=lambda line: None, fail_fast=True)
    first, *others = outcomes_of(read_ablation(tmp_path / "run"))
    parts = [one.grand for one in others if one.name.startswith("2shot_")]
    assert first.name == "2shot" and not first.is_higher_better and len(parts) == 2
    assert first.grand == pytest.approx(np.mean(parts))


def test_published_prompts_are_cut_and_compared_as_published(grid):
    (file,) = (grid / "run/points/0.001/cells").glob("*/predictions/row01/default/2shot_digits.jsonl")
    for line in read_jsonl(file):
        assert line["prompt"].count("Short answer:") == 3
        assert "\n" not in line["output"] and "," not in line["output"]


def test_an_outcome_that_no_cell_measures_is_refused(grid):
    with pytest.raises(UserError, match=r"'grid.outcome' names an unknown outcome '4shot'\..*Did you mean '[02]shot'"):
        read_grid(grid / "grid.yaml", changes=["grid.outcome=4shot"])
