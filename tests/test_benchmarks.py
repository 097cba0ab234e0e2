"""The benchmarks run in their smallest form and say what they promise; no time is asserted."""

import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

from alula.files import read_json
from composed_models import make_processor, tiny_model

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.filterwarnings("default")  # a script warns, and goes on


def run(script, *arguments):
    """What the script says, run here: another process would import for longer than it measures."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said:
        patch.syspath_prepend(FOLDER)
        patch.setattr(sys, "argv", [script, *map(str, arguments), "--threads", "1"])
        try:
            runpy.run_path(str(FOLDER / script), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
    return said.getvalue()


def run_apart(script, *arguments):
    """The same in a process, for what starts processes itself."""
    command = [sys.executable, str(FOLDER / script), *map(str, arguments), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_trainer_learns_what_a_bare_loop_learns(tmp_path):
    out = tmp_path / "trainer.json"
    said = run("trainer.py", "--hidden", 32, "--layers", 1, "--batch-size", 2, "--steps", 3, "--repeats", 1, "--words", 4, "--out", out)
    assert "Losses agree to 1e-05" in said
    rows = read_json(out)["rows"]
    assert [row["with_loading"] for row in rows] == [False, True]
    assert all(row["losses_equal"] and row["trainer"]["cpu"]["median"] > 0 for row in rows)


@pytest.fixture(scope="module")
def routing(tmp_path_factory):
    out = tmp_path_factory.mktemp("routing") / "cost.json"
    sizes = ("--samples", 4, "--steps", 2, "--batch-size", 2, "--hidden", 32, "--layers", 1, "--general", 4)
    names = ("--names", "emoji_en", "digits", "words", "--tasks", 3)
    said = run("cost_of_routing.py", *sizes, *names, "--experts", 1, 3, "--beyond", 1000, "--tokens", 2, "--repeats", 1, "--out", out)
    return read_json(out), said, out


def test_an_arriving_task_costs_an_expert_the_same_and_joint_training_more_each_time(routing):
    found, _, _ = routing
    once, *routed = found["arrivals"]["routed"]
    joint = found["arrivals"]["joint"]
    assert once["name"] == "once"
    assert [row["samples"] for row in routed] == [2 * 2 + 4] * 3  # steps, then statistics over all four
    assert [row["samples"] for row in joint] == [4, 8, 12]
    again = {row["name"]: row for row in found["routed_reversed"]}
    assert all(again[row["name"]]["flops"] == row["flops"] for row in routed)  # wherever in the stream it comes
    flops = [row["flops"] for row in joint]
    assert flops == sorted(flops) and flops[2] > 2 * flops[0] > 0


def test_measured_bytes_are_those_of_the_formula_and_beyond_them_it_stands_alone(routing):
    found, said, out = routing
    *measured, paper = found["pools"]
    for row in measured:
        assert row["stored_bytes"] == row["on_paper"]["stored_bytes"]
        assert all(value > 0 for value in row["milliseconds_per_token"].values())
    assert paper["experts"] == 1000 and "milliseconds_per_token" not in paper
    assert "sum r(n + d)" in said
    assert said.strip() == out.with_suffix(".md").read_text().strip()


def test_every_form_of_low_rank_experts_runs_and_its_bars_are_shown(tmp_path):
    out = tmp_path / "experts.json"
    said = run_apart("experts.py", "--small", "--out", out)
    found = read_json(out)
    (whole,) = found["whole"]
    forms = {"frozen base", "PEFT LoRA", "PEFT, all adapters active", "PEFT Arrow", "PEFT X-LoRA", "PEFT Poly", "CoIN's loop", "ours"}
    assert whole["train"].keys() == whole["forward"].keys() == forms, said
    assert whole["saved"].keys() == forms - {"frozen base"}
    assert {"ours, expert told", "ours, gates"} < found["decoding"][0]["decode"].keys()
    assert whole["least"] > 1 and found["ceilings"]["flops"] > 0
    assert "(≤ 1.05: " in said and said.strip().endswith(out.with_suffix(".md").read_text().strip())


def test_every_form_of_the_pipeline_gives_the_same_and_its_parts_are_shown(tmp_path):
    out, folder = tmp_path / "pipeline.json", tmp_path / "model"
    tiny_model("hf").save_pretrained(folder)
    make_processor().save_pretrained(folder)
    sizes = ("--steps", 1, "--batch-size", 2, "--samples", 2, "--side", 64, "--repeats", 1)
    said = run("pipeline.py", "--model", folder, *sizes, "--out", out)
    found = read_json(out)["rows"]
    assert found.keys() == {"train", "generated", "ranked", "prose"}
    (before,), (after,) = found["train"]["before"], found["train"]["images"]
    assert before["parts"].keys() == after["parts"].keys() and all(before["parts"][part] > 0 for part in ("collation", "head", "backward"))
    assert "| training, a step | after |" in said


def test_both_forms_of_an_update_agree_and_are_measured(tmp_path):
    out = tmp_path / "forms.json"
    said = run("forms.py", "--small", "--out", out)
    rows = read_json(out)["rows"]
    assert [(row["width"], row["experts"], row["ranks_per_slot"]) for row in rows] == [(16, 2, 2.0), (16, 4, 4.0)]
    assert all(row[name].keys() == {"dense", "loop"} for row in rows for name in ("forward", "training"))
    assert len(said.splitlines()) == 2 + len(rows)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_a_large_pool_is_opened_and_asked(tmp_path):
    model, pool, out = tmp_path / "model", tmp_path / "pool", tmp_path / "pool.json"
    tiny_model("hf").save_pretrained(model)
    make_processor().save_pretrained(model)
    runpy.run_path(str(FOLDER / "large_pool.py"))["make"](pool, str(model), 3, 2)  # here: the script would start a process for it
    said = run("large_pool.py", pool, "--model", model, "--out", out)
    found = read_json(out)
    assert found["experts"] == 3 and found["megabytes_on_disk"] > 0 and found["seconds_to_open"] > 0
    assert found.keys() == {line.split()[0] for line in said.splitlines()}


def test_two_level_routing_is_measured(tmp_path):
    said = run("two_level.py", "--pools", 64, "--dim", 16, "--groups", 1, 8)
    rows = [[float(cell) for cell in line.strip("|").split("|")] for line in said.splitlines()[2:]]
    assert len(rows) == 6
    for few, all_of_them in zip(rows[::2], rows[1::2], strict=True):
        assert few[3] <= all_of_them[3] == 1.0
