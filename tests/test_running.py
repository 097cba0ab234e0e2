"""A whole run on a tiny model of a real architecture: every file that the report reads, resumption, crashes."""

import json
import re
import shutil

import pytest

from alula.config import check_recipe
from alula.errors import UserError
from alula.files import read_json, read_jsonl
from alula.report import build_report
from alula.running.run import run_recipe
from zoo import build


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny random LLaVA and its processor."""
    folder = tmp_path_factory.mktemp("tiny")
    model, processor = build("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def recipe(tiny, **changes):
    raw = {
        "model": str(tiny),
        "tasks": [{"name": "easy_vqa", "train_size": 12, "test_size": 6}, {"name": "digits", "train_size": 12, "test_size": 6}],
        "base_tasks": [{"name": "capital", "test_size": 5}, {"name": "prose", "test_size": 3}],
        "methods": [
            {"name": "routed", "options": {"arms": ["analytic", "gate", "oracle"], "gate_steps": 2, "rank": 2, "layers": [1, 2]}},
            {"name": "finetune", "options": {"rank": 2}},
            {"name": "joint", "options": {"rank": 2}},
            {"name": "specialist", "options": {"rank": 2, "layers": [1, 2]}},
        ],
        "seeds": [0],
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 1e-2},
        "trackers": ["tensorboard"],
        "examples": 2,
    }
    return check_recipe({**raw, **changes})


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert run_recipe(recipe(tiny), folder, say=lambda line: None, fail_fast=True) == 0
    return folder


def scores(folder, cell):
    rows = read_jsonl(folder / "cells" / cell / "scores.jsonl")
    return {(row["row"], row["arm"], row["task"]): row["score"] for row in rows}


def test_every_score_traces_to_stored_predictions(finished):
    for cell in sorted((finished / "cells").iterdir()):
        for row in read_jsonl(cell / "scores.jsonl"):
            path = cell / "predictions" / f"row{row['row']:02d}" / row["arm"] / f"{row['task']}.jsonl"
            stored = read_jsonl(path)
            assert len(stored) == row["num_samples"]
            if row["metric"] != "bits_per_byte":
                assert sum(line["score"] for line in stored) / len(stored) == row["score"]


def test_row_zero_is_the_same_untouched_model_in_every_cell(finished):
    rows = [{key: value for key, value in scores(finished, cell.name).items() if key[0] == 0} for cell in (finished / "cells").iterdir()]
    assert all(row == rows[0] for row in rows)


def test_specialist_scores_are_the_oracle_arm_of_routed(finished):
    routed, specialist = scores(finished, "routed-seed0"), scores(finished, "specialist-seed0")
    oracle = {key: value for key, value in routed.items() if key[1] == "oracle"}
    assert oracle == {key: value for key, value in specialist.items() if key[0] > 0}


def test_the_report_of_a_real_run_shows_every_method_and_asks_nothing_of_the_network(finished, tmp_path):
    page = build_report(finished, out=tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("routed:analytic", "routed:gate", "routed:oracle", "finetune", "joint", "specialist"):
        assert name in page
    assert not re.search(r"(src|href)=\"https?:", page)
    routing = read_json(finished / "cells" / "routed-seed0" / "routing.json")
    assert all(arm["layers"] == [1, 2] and all(len(task) == 2 for task in arm["weights"]) for arm in routing)


def test_every_score_is_in_the_tracker(finished):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    cell = finished / "cells" / "finetune-seed0"
    kept = min(cell.rglob("events.out.*"), key=lambda path: len(path.parts))  # settings are in a folder below
    found = accumulator.EventAccumulator(str(kept.parent))
    found.Reload()
    for task in ("easy_vqa", "digits", "capital", "prose"):
        kept_scores = [row["score"] for row in read_jsonl(cell / "scores.jsonl") if row["task"] == task]
        assert [event.value for event in found.Scalars(f"score/{task} (default)")] == pytest.approx(kept_scores)


def test_joint_has_one_row_after_all_tasks(finished):
    rows = {key[0] for key in scores(finished, "joint-seed0")}
    assert rows == {0, 1}


def test_base_tasks_can_be_scored_after_the_last_task_only(tiny, finished, tmp_path):
    methods = [{"name": "finetune", "options": {"rank": 2}}, {"name": "joint", "options": {"rank": 2}}]
    few = recipe(tiny, methods=methods, evaluation={"base_every_task": False}, examples=0)
    assert run_recipe(few, tmp_path / "run", say=lambda line: None, fail_fast=True) == 0
    for cell in ("finetune-seed0", "joint-seed0"):
        every = scores(finished, cell)
        last = max(row for row, _, _ in every)
        due = {key: score for key, score in every.items() if key[0] in (0, last) or key[2] not in ("capital", "prose")}
        assert scores(tmp_path / "run", cell) == due
    assert "Base forgetting" in build_report(tmp_path / "run").read_text()


def test_routing_weights_sum_to_one(finished):
    for arm in read_json(finished / "cells" / "routed-seed0" / "routing.json"):
        for task in arm["weights"]:
            for layer in task:
                assert abs(sum(layer) - 1) < 1e-4


def test_base_tasks_keep_their_scores_under_the_analytic_router(finished):
    found = scores(finished, "routed-seed0")
    for task in ("capital", "prose"):
        assert found[2, "analytic", task] == found[0, "default", task]


def test_finished_cells_are_skipped_and_another_recipe_is_refused(tiny, finished):
    said = []
    run_recipe(recipe(tiny), finished, say=said.append)
    assert all(line.endswith("done already") for line in said)
    with pytest.raises(UserError, match=r"another recipe .*: train\.steps was 2, is 3\. Methods and seeds may be added"):
        run_recipe(recipe(tiny, train={"steps": 3, "batch_size": 4, "learning_rate": 1e-2}), finished)


def test_a_crashed_cell_is_written_down_and_loses_no_other(tiny, tmp_path):
    methods = [{"name": "finetune", "options": {"layers": [99]}}, {"name": "finetune_full"}]
    said = []
    crashed = run_recipe(recipe(tiny, methods=methods), tmp_path / "run", say=said.append)
    assert crashed == 1
    assert "no decoder layer 99" in json.loads((tmp_path / "run/cells/finetune-seed0/crashed.json").read_text())["error"]
    assert (tmp_path / "run/cells/finetune_full-seed0/done.json").exists()


def test_a_cell_cut_between_rows_resumes_to_the_same_scores(tiny, finished, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    cell = copy / "cells" / "routed-seed0"
    (cell / "done.json").unlink()
    shutil.rmtree(cell / "predictions" / "row02")
    half = cell / ".scores.jsonl.4242.part"  # of a process that was killed while it wrote
    half.write_text("{")
    assert run_recipe(recipe(tiny), copy, say=lambda line: None) == 0
    assert scores(copy, "routed-seed0") == scores(finished, "routed-seed0")
    assert not half.exists()
