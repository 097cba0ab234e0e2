"""The gate: paired tests by hand-computed numbers, and the verb on stored predictions, by exit code."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from alula.cli.app import app
from alula.evaluation.paired import Pairs, judge, match, mcnemar, sign_flip, smallest_visible_loss
from alula.evaluation.scores import Prediction
from alula.files import read_jsonl, write_jsonl
from alula.report import summary
from run_folder import write_run

LIMITS = {"base_forgetting": 1.0, "base_bits_increase": 0.02}


def gate(*arguments):
    return CliRunner().invoke(app, ["gate", *(str(argument) for argument in arguments)])


def rows(task, scores, *, prompts="Question {}?"):
    return [
        Prediction(id=f"{task}/{i}", task=task, prompt=prompts.format(i), reference="a", output="", score=float(score)).as_row()
        for i, score in enumerate(scores)
    ]


def prose(bits, *, task="prose"):
    return [
        Prediction(id=f"{task}/{i}", task=task, prompt="", reference="x", output="", score=b / 100, loss_bits=b, bytes=100).as_row()
        for i, b in enumerate(bits)
    ]


def folder(place, *tasks):
    for found in tasks:
        write_jsonl(place / f"{found[0]['task']}.jsonl", found)
    return place


def two(tmp_path, base, tuned):
    return folder(tmp_path / "base", *base), folder(tmp_path / "tuned", *tuned)


def answers(generator, count, *, lost, gained):
    luck = generator.random(count)
    base = np.where(luck < lost, 1.0, 0.0)
    return Pairs(task="t", base=base, tuned=np.where((luck >= lost) & (luck < lost + gained), 1.0, 0.0), weights=np.ones(count))


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [(0, 0, 1), (0, 4, 1), (5, 0, 1 / 32), (6, 1, 8 / 128), (9, 1, 11 / 1024), (3, 3, 42 / 64), (1, 0, 1 / 2)],
)
def test_mcnemar_is_the_binomial_tail_one_computes_by_hand(lost, gained, expected):
    assert mcnemar(lost, gained) == pytest.approx(expected, abs=1e-15)


def test_flipping_signs_is_mcnemar_for_right_and_wrong_and_exact_for_few():
    assert sign_flip(np.array([1.0] * 6 + [-1.0] + [0.0] * 50)) == mcnemar(6, 1)
    assert sign_flip(np.array([1.0, 2.0, 3.0])) == 1 / 8  # only all three up
    assert sign_flip(np.array([1.0, 2.0, -0.5])) == 2 / 8  # 3.5 and 2.5 itself
    assert sign_flip(np.zeros(9)) == 1.0
    assert sign_flip(np.array([1.0] * 15 + [-1.0] * 6)) == pytest.approx(mcnemar(15, 6), abs=0.01)  # drawn, not counted


def test_the_bound_is_that_of_a_reference_implementation():
    base, tuned = [1] * 12 + [0] * 4 + [1] * 26 + [0] * 6, [1] * 12 + [1] * 4 + [0] * 26 + [0] * 6
    (pairs,) = match(rows("t", base), rows("t", tuned))
    loss, variance = pairs.estimate()
    assert (loss, variance**0.5) == pytest.approx((0.44, 0.09448809), abs=1e-8)  # R: statpsych::ci.prop.ps(.05, 12, 4, 26, 6)


def test_a_lost_skill_fails_with_exit_code_1(tmp_path):
    result = gate(*two(tmp_path, [rows("capital", [1] * 40 + [0] * 10)], [rows("capital", [1] * 25 + [0] * 25)]))
    assert result.exit_code == 1
    assert "FAIL: Base forgetting is 30.0 points (n = 50, 15 changed), above the limit of 1 by more than chance" in result.stdout
    assert "fails if a loss is above its limit" in " ".join(result.stdout.split())


def test_a_kept_skill_passes_and_says_which_loss_would_have_been_seen(tmp_path):
    result = gate(*two(tmp_path, [rows("capital", [1] * 40 + [0] * 10)], [rows("capital", [0] + [1] * 40 + [0] * 9)]))
    assert result.exit_code == 0, result.output
    assert "PASS: Base forgetting is 0.0 points" in result.stdout
    assert "would be seen four times in five" in result.stdout


def test_too_few_samples_pass_only_with_a_warning_and_never_when_strict(tmp_path):
    folders = two(tmp_path, [rows("capital", [1] * 4)], [rows("capital", [0] * 4)])
    result = gate(*folders)
    assert result.exit_code == 0
    assert "above the limit of 1, but not by more than chance (p = 0.062, at most 0.05 is wanted)" in result.stdout
    assert "No loss could have been seen: too few samples." in result.stdout
    assert gate(*folders, "--strict").exit_code == 1


def test_strict_takes_twenty_equal_answers_for_no_proof_and_two_thousand_for_one(tmp_path):
    few = two(tmp_path / "few", [rows("capital", [1] * 20)], [rows("capital", [1] * 20)])
    result = gate(*few, "--strict")
    assert result.exit_code == 1
    assert "0.0 points (n = 20, not one changed), but up to 10.6 cannot be excluded with 95 % confidence" in result.stdout
    assert gate(*few).exit_code == 0
    many = two(tmp_path / "many", [rows("capital", [1] * 2000)], [rows("capital", [0] * 5 + [1] * 1995)])
    assert gate(*many, "--strict").exit_code == 0


def test_prose_is_worse_with_more_bits_and_has_a_limit_of_its_own(tmp_path):
    bits = [100.0 + i for i in range(30)]
    more, fewer = ([b + change + 0.1 * (i % 5) for i, b in enumerate(bits)] for change in (6, -6))
    worse = two(tmp_path / "worse", [prose(bits)], [prose(more)])
    result = gate(*worse, "--json")
    (meter,) = json.loads(result.stdout)["meters"]
    assert result.exit_code == 1
    assert (meter["name"], meter["unit"]) == ("base_bits_increase", "bits per byte")
    assert meter["loss"] == pytest.approx(0.062)
    assert gate(*worse, "--max-bits-increase", 0.1).exit_code == 0
    assert gate(*two(tmp_path / "better", [prose(bits)], [prose(fewer)])).exit_code == 0


def test_bits_and_points_are_never_averaged_and_share_the_level():
    lost = match(rows("capital", [1] * 50), rows("capital", [0] * 5 + [1] * 45))
    both = lost + match(prose([100.0] * 9), prose([100.0] * 9))
    strictest = {"base_forgetting": 0.0, "base_bits_increase": 0.0}
    (alone,) = judge(lost, limits=strictest)
    points, bits = judge(both, limits=strictest)
    assert (alone.p_value, alone.level, alone.passed) == (1 / 32, 0.05, False)
    assert (points.p_value, points.level, points.passed) == (1 / 32, 0.025, True)  # 0.031 is not below half of 0.05
    assert (points.loss, bits.loss, bits.passed) == (10.0, 0.0, True)


def test_a_loss_that_the_mean_hides_is_named(tmp_path):
    first, second = [1] * 40 + [0] * 10, [1] * 25 + [0] * 25
    result = gate(*two(tmp_path, [rows("capital", first), rows("antonym", second)], [rows("capital", second), rows("antonym", first)]))
    assert result.exit_code == 0
    assert "But capital alone lost 30.0 (p < 0.001): the mean hides it." in result.stdout


def test_a_tolerated_loss_rarely_fails_and_the_smallest_visible_one_mostly_does():
    generator = np.random.default_rng(0)
    failed = [not judge([answers(generator, 60, lost=0.06, gained=0.05)], limits=LIMITS)[0].passed for _ in range(100)]
    assert np.mean(failed) <= 0.1  # 0.05 and two standard errors of 100 draws
    smallest = smallest_visible_loss([answers(generator, 60, lost=0.0, gained=0.0)], limit=0.01, level=0.05)
    seen = [not judge([answers(generator, 60, lost=smallest, gained=0.0)], limits=LIMITS)[0].passed for _ in range(100)]
    assert 0.7 <= np.mean(seen) <= 0.95


def test_the_order_of_lines_and_one_file_or_many_change_nothing(tmp_path):
    generator = random.Random(0)
    base = [rows("capital", [i % 3 > 0 for i in range(40)]), rows("antonym", [i % 2 for i in range(30)])]
    tuned = [rows("capital", [i % 4 > 1 for i in range(40)]), rows("antonym", [i % 5 > 1 for i in range(30)])]
    before, after = two(tmp_path, base, tuned)
    mixed = [row for task in tuned for row in task]
    generator.shuffle(mixed)
    write_jsonl(tmp_path / "mixed.jsonl", mixed)
    first, second = gate(before, after, "--json"), gate(before, tmp_path / "mixed.jsonl", "--json")
    in_order = [sorted(json.loads(one.stdout)["tasks"], key=lambda row: row["task"]) for one in (first, second)]
    assert in_order[0] == in_order[1]
    assert first.exit_code == second.exit_code


def test_samples_that_share_an_id_are_paired_by_what_they_ask():
    base = [{**row, "id": "same"} for row in rows("t", [1, 0, 1])]
    (pairs,) = match(base, [{**row, "score": row["score"]} for row in reversed(base)])
    assert (pairs.num_samples, pairs.lost, pairs.gained) == (3, 0, 0)


BAD = [
    (rows("t", [1, 1, 1]), rows("t", [1, 1]), "TUNED lacks 1 of the samples of 't'", "'t/2'"),
    (rows("t", [1]), rows("t", [1, 1]), "BASE lacks 1 of the samples of 't'", "'t/1'"),
    (rows("capital", [1]), rows("capitol", [1]), "BASE has no predictions of the task 'capitol'", "Did you mean 'capital'"),
    ([*rows("t", [1]), *rows("u", [1])], rows("t", [1]), "TUNED has no predictions of the task 'u'", "Known: t"),
    (rows("t", [1]), rows("t", [1], prompts="Other {}?"), "the prompt is 'Question 0?' in BASE", "'Other 0?' in TUNED"),
    (rows("t", [1]), [{**rows("t", [1])[0], "reference": "b"}], "the reference is 'a' in BASE", "'b' in TUNED"),
    (rows("t", [1]), [{**rows("t", [1])[0], "score": None}], "'t/0': score is None", "a finite number is wanted"),
    (prose([90]), [{**prose([90])[0], "bytes": 50}], "the bytes of a sample are 0, or differ", "Score the same text"),
    (prose([90]), rows("prose", [1]), "TUNED", "BASE"),
    (rows("t", [1]), [{"task": "t", "name": 1}], "has a row with task, name", "id, prompt, reference and score are wanted"),
]


@pytest.mark.parametrize(("base", "tuned", "says", "too"), BAD)
def test_predictions_that_do_not_match_are_refused_with_exit_code_2(tmp_path, base, tuned, says, too):
    result = gate(*two(tmp_path, [base], [tuned]))
    assert result.exit_code == 2, result.output
    assert says in result.stderr and too in result.stderr
    assert result.stdout == ""


def test_wrong_arguments_are_told(tmp_path):
    before, _ = two(tmp_path, [rows("t", [1])], [rows("t", [1])])
    for arguments, says in [
        ((before,), "BASE TUNED"),
        ((before, before, "--cell", "c"), "one or the other"),
        ((before, before, "--arm", "gate"), "without --cell"),
        ((before, tmp_path), "holds no .jsonl file"),
        ((before, tmp_path / "nowhere"), "No file"),
        ((before, before, "--task", "u"), "Known: t"),
        ((before, before, "--max-base-forgetting", "inf"), "not a finite number"),
    ]:
        result = gate(*arguments)
        assert result.exit_code == 2, arguments
        assert says in result.stderr, arguments


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("gate") / "run", seeds=1)


def test_a_cell_of_a_run_is_gated_on_its_base_tasks_with_the_reports_number(run):
    found = json.loads(gate(run, "--cell", "finetune-seed0", "--json").stdout)
    assert [row["task"] for row in found["tasks"]] == ["antonym", "definition", "prose"]
    (finetune,) = (row for row in summary(run) if row["series"] == "finetune")
    points, bits = found["meters"]
    assert points["loss"] == pytest.approx(finetune["metrics"]["base_forgetting"]["mean"])
    assert bits["loss"] == pytest.approx(finetune["metrics"]["base_bits_increase"]["mean"])
    assert not found["passed"]


def test_the_folders_of_a_cell_give_what_the_cell_gives(run):
    rows_of = run / "cells" / "routed-seed0" / "predictions"
    by_name = gate(run, "--cell", "routed-seed0", "--arm", "analytic")
    assert by_name.exit_code == 0
    assert gate(rows_of / "row00" / "default", rows_of / "row04" / "analytic").stdout == by_name.stdout
    one = gate(rows_of / "row00" / "default", rows_of / "row04" / "analytic", "--task", "animals", "--json")
    assert [row["task"] for row in json.loads(one.stdout)["tasks"]] == ["animals"]


def test_a_cell_that_leaves_a_choice_or_has_not_finished_is_refused(run):
    for arguments, says in [
        (("--cell", "routed-seed0"), "analytic, gate, oracle"),
        (("--cell", "routed-seed0", "--arm", "analytik"), "Did you mean 'analytic'"),
        (("--cell", "routed-seed7"), "Did you mean 'routed-seed0'"),
        (("--cell", "finetune-seed1"), "is unfinished"),
    ]:
        result = gate(run, *arguments)
        assert result.exit_code == 2, arguments
        assert says in result.stderr, arguments


def test_the_table_fits_eighty_columns_and_counts_are_those_of_the_files(run):
    lines = gate(run, "--cell", "finetune-seed0").stdout.splitlines()
    assert max(len(line) for line in lines[: next(i for i, line in enumerate(lines) if line.startswith("FAIL"))]) <= 80
    predictions = run / "cells" / "finetune-seed0" / "predictions"
    before, after = (read_jsonl(predictions / row / "default" / "antonym.jsonl") for row in ("row00", "row04"))
    lost = sum(a["score"] > b["score"] for a, b in zip(before, after, strict=True))
    gained = sum(a["score"] < b["score"] for a, b in zip(before, after, strict=True))
    assert any("antonym" in line and f"{lost}/{gained}" in line for line in lines)


def test_the_gate_needs_no_torch(run):
    code = "import sys\nfrom alula.cli.app import app\napp(sys.argv[1:], standalone_mode=False)\nassert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code, "gate", str(run), "--cell", "routed-seed0", "--arm", "analytic"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
