"""Claims about what a run adds up to: arithmetic on its scores, references, seeds and orders."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import run_folder
from alula.evaluation.bootstrap import draw_counts
from alula.files import read_jsonl, write_json, write_jsonl, write_text
from alula.report import build_report, summary
from alula.report.reading import read_run
from alula.report.series import series_of
from alula.report.verdict import difference
from html_page import Page
from run_folder import BASE_TASKS, NUM_SAMPLES, TASKS, rows_of, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "emoji & charts")


def test_the_summary_equals_arithmetic_on_the_scores(run: Path) -> None:
    found = {row["series"]: row["metrics"] for row in summary(run)}
    by_seed = []
    for seed in (0, 1):
        rows = rows_of(run, f"finetune-seed{seed}")
        score = {(row, task): rows[row, "default", task]["score"] for row, arm, task in rows if arm == "default"}
        by_seed.append(
            {
                "average_score": 100 * sum(score[4, task] for task in TASKS) / 4,
                "backward_transfer": 100 * sum(score[4, task] - score[i + 1, task] for i, task in enumerate(TASKS[:3])) / 3,
                "base_forgetting": 100 * sum(score[0, task] - score[4, task] for task in BASE_TASKS[:2]) / 2,
                "base_bits_increase": score[4, "prose"] - score[0, "prose"],
                "unparsed_share": 100 * sum(rows[4, "default", task]["unparsed"] for task in TASKS) / (4 * NUM_SAMPLES),
            }
        )
    for name in by_seed[0]:
        values = [one[name] for one in by_seed]
        metric = found["finetune"][name]
        assert metric["mean"] == pytest.approx(sum(values) / 2)
        assert (metric["min"], metric["max"]) == (pytest.approx(min(values)), pytest.approx(max(values)))
        assert metric["seeds"] == 2
    assert found["finetune"]["average_score"]["samples"] == 4 * NUM_SAMPLES
    assert found["finetune"]["backward_transfer"]["samples"] == 3 * NUM_SAMPLES


def test_intervals_hold_their_mean(run: Path) -> None:
    for row in summary(run):
        for name in ("average_score", "backward_transfer", "base_forgetting"):
            metric = row["metrics"][name]
            assert metric["mean"] is None or metric["low"] <= metric["mean"] <= metric["high"]


def test_the_share_of_unread_answers_is_resampled_as_scores_are(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for metric in (row["metrics"]["unparsed_share"] for row in summary(copy)):
        assert metric["low"] <= metric["mean"] <= metric["high"] and metric["high"] > metric["low"]
    draws = [draw_counts(NUM_SAMPLES, resamples=1000, seed=0, name=name) for name in TASKS]
    unread = [
        np.array([not line["parsed"] for line in read_jsonl(copy / f"cells/joint-seed0/predictions/row01/default/{name}.jsonl")])
        for name in TASKS
    ]
    shares = sum(drawn @ values for drawn, values in zip(draws, unread, strict=True)) / (4 * NUM_SAMPLES)
    joint = next(one for one in series_of(read_run(copy)) if one.name == "joint")
    assert joint.members[0].resampled["unparsed_share"] == pytest.approx(shares)
    path = copy / "cells/joint-seed1/predictions/row01/default/digits.jsonl"
    write_jsonl(path, [{key: value for key, value in line.items() if key != "parsed"} for line in read_jsonl(path)])
    found = next(row["metrics"]["unparsed_share"] for row in summary(copy) if row["series"] == "joint")
    assert found["mean"] is not None and found["low"] is None  # the count is stored, which answers it were is not


def test_joint_training_has_a_last_row_and_no_backward_transfer(run: Path) -> None:
    joint = next(row for row in summary(run) if row["series"] == "joint")
    assert joint["is_reference"] and joint["metrics"]["average_score"]["samples"] == 4 * NUM_SAMPLES
    assert joint["metrics"]["backward_transfer"]["mean"] is None


def test_gaps_are_paired_differences_of_average_scores(run: Path) -> None:
    by_name = {series.name: series for series in series_of(read_run(run))}
    for name, reference in (("gap_to_joint", "joint"), ("gap_to_specialist", "routed:oracle")):
        for other in set(by_name) - {reference}:
            gap, interval = difference(by_name[reference], by_name[other])
            assert by_name[other].spread(name).mean == pytest.approx(gap)
            found = by_name[other].interval(name)
            assert found is not None and interval is not None and found.low <= gap <= found.high
            assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
        own = next(row["metrics"][name] for row in summary(run) if row["series"] == reference)
        assert own["mean"] is None and own["low"] is None  # nothing is held against itself


def test_a_method_called_specialist_is_the_specialist(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for seed in (0, 1):
        shutil.copytree(copy / "cells" / f"rehearsal-seed{seed}", copy / "cells" / f"specialist-seed{seed}")
    found = {row["series"]: row["metrics"] for row in summary(copy)}
    assert found["rehearsal"]["gap_to_specialist"]["mean"] == found["rehearsal"]["gap_to_specialist"]["low"] == 0
    assert found["routed:oracle"]["gap_to_specialist"]["mean"] < 0


def test_where_every_method_sees_all_tasks_at_once_none_is_a_mere_reference(tmp_path: Path) -> None:
    write_run(tmp_path, seeds=2, with_failures=False)
    for cell in (tmp_path / "cells").iterdir():
        if cell.name.startswith("joint-"):
            shutil.copytree(cell, cell.with_name(cell.name.replace("joint", "wings")))
        else:
            shutil.rmtree(cell)
    assert {row["series"]: row["is_reference"] for row in summary(tmp_path)} == {"joint": False, "wings": False}
    assert "highest average score" in build_report(tmp_path).read_text(encoding="utf-8")


def test_joint_training_is_known_by_what_it_did_not_by_its_name(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for seed in (0, 1):
        (copy / "cells" / f"joint-seed{seed}").rename(copy / "cells" / f"full_at_once-seed{seed}")
    before, after = ({row["series"]: row for row in summary(folder)} for folder in (run, copy))
    assert after["full_at_once"]["is_reference"]
    assert after["finetune"]["metrics"]["gap_to_joint"] == before["finetune"]["metrics"]["gap_to_joint"]
    assert "The reference full_at_once (all tasks at once)" in Page(build_report(copy).read_text(encoding="utf-8")).text


@pytest.fixture(scope="module")
def two_orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of finetune in two orders, and of joint in one."""
    folder = write_run(tmp_path_factory.mktemp("orders") / "run", with_failures=False)
    for path in folder.glob("cells/r*"):
        shutil.rmtree(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "TASKS", TASKS[::-1])
        for seed in (0, 1):
            cell = folder / "cells" / f"finetune-seed{seed}-order1"
            run_folder.write_cell(cell, "finetune", seed, ("default",))
            write_json(cell / "order.json", {"tasks": list(TASKS[::-1])})
    return folder


def test_the_spread_is_over_seeds_and_orders(two_orders: Path) -> None:
    found = {row["series"]: row for row in summary(two_orders)}
    assert (found["finetune"]["seeds"], found["finetune"]["orders"], found["joint"]["orders"]) == ([0, 1], [0, 1], [0])
    scores, transfers = [], []
    for seed in (0, 1):
        for suffix, order in (("", TASKS), ("-order1", TASKS[::-1])):
            rows = rows_of(two_orders, f"finetune-seed{seed}{suffix}")
            score = {(row, task): rows[row, "default", task]["score"] for row, arm, task in rows if arm == "default"}
            scores.append(100 * np.mean([score[4, task] for task in TASKS]))
            transfers.append(100 * np.mean([score[4, task] - score[i + 1, task] for i, task in enumerate(order[:3])]))
    for name, values in (("average_score", scores), ("backward_transfer", transfers)):
        metric = found["finetune"]["metrics"][name]
        assert (metric["cells"], metric["seeds"], metric["orders"]) == (4, 2, 2)
        assert metric["mean"] == pytest.approx(np.mean(values)) and metric["sd"] == pytest.approx(np.std(values, ddof=1))
        assert (metric["min"], metric["max"]) == (pytest.approx(min(values)), pytest.approx(max(values)))
        assert metric["low"] <= metric["mean"] <= metric["high"]


def test_orders_are_named_in_the_report(two_orders: Path) -> None:
    text = Page(build_report(two_orders).read_text(encoding="utf-8")).text
    for words in ("4 cells: 2 seeds, 2 orders", " → ".join(TASKS[::-1]), "seed 1, order 1", "2 with another task order not in this mean"):
        assert words in text, words
    assert "does not fit" not in text and "things that do not fit together" not in text


def test_a_reference_without_that_order_is_compared_by_seed(two_orders: Path) -> None:
    by_name = {series.name: series for series in series_of(read_run(two_orders))}
    joint = {member.cell.seed: member for member in by_name["joint"].members}
    for member in by_name["finetune"].members:
        gap = joint[member.cell.seed].summaries["average_score"] - member.summaries["average_score"]
        assert member.summaries["gap_to_joint"] == pytest.approx(gap)


def test_an_order_that_the_scores_deny_is_reported(two_orders: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(two_orders, tmp_path / "run")
    write_json(copy / "cells" / "finetune-seed0-order1" / "order.json", {"tasks": [TASKS[3], *TASKS[:3]]})
    write_text(copy / "cells" / "finetune-seed1-order1" / "order.json", '{"tasks": [')
    text = Page(build_report(copy).read_text(encoding="utf-8")).text
    assert "finetune-seed0-order1: charts was not learnt where its order names it (shapes, animals, digits, charts)." in text
    assert "order.json" in text and "not valid JSON" in text


def test_the_base_row_may_be_stored_by_one_cell_for_all(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for cell in copy.glob("cells/finetune-seed*"):
        rows = read_jsonl(cell / "scores.jsonl")
        write_jsonl(cell / "scores.jsonl", [row for row in rows if row["row"] > 0])
        shutil.rmtree(cell / "predictions" / "row00")
    before, after = ({row["series"]: row["metrics"] for row in summary(folder)}["finetune"] for folder in (run, copy))
    assert after["base_forgetting"]["mean"] == pytest.approx(before["base_forgetting"]["mean"])
