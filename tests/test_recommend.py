"""A recommendation: what is not allowed is out before training, a short pilot measures the rest, one rule decides."""

import json
from dataclasses import replace

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from alula.cli.app import app
from alula.cli.recommend import BYTES, SECONDS, read_amount
from alula.config import read_recipe
from alula.errors import UserError
from alula.evaluation.bootstrap import Interval
from alula.files import read_json, read_jsonl, write_jsonl
from alula.methods import METHODS
from alula.running.candidates import (
    RULE,
    Limits,
    Line,
    Sizes,
    candidates,
    constrain,
    decide,
    estimate_memory,
    extrapolate_seconds,
    judge,
    measure_sizes,
)
from alula.training import TrainSettings
from zoo import build

SIZES = Sizes(model=1000, decoder=800, expert=10)


def by_name():
    return {candidate.name: candidate for candidate in candidates(TrainSettings(steps=1, learning_rate=1e-3))}


def allowed(limits, *, num_tasks=2):
    lines = [constrain(candidate, SIZES, limits, num_tasks=num_tasks) for candidate in by_name().values()]
    return {line.name for line in lines if not line.out}


def test_every_candidate_is_a_method_that_alula_has():
    assert all(candidate.choice.name in METHODS for candidate in by_name().values())


def test_without_old_data_joint_training_and_rehearsal_are_out():
    assert set(by_name()) - allowed(Limits()) == {"joint", "joint_full", "rehearsal"}
    assert allowed(Limits(keeps_old_data=True)) == set(by_name())


def test_full_fine_tuning_is_out_where_memory_allows_only_an_expert():
    assert allowed(Limits(keeps_old_data=True, memory=2000)) == {"finetune", "routed", "joint", "rehearsal"}
    assert allowed(Limits(keeps_old_data=True, memory=999)) == set()


def test_memory_is_weights_and_experts_and_three_times_what_trains():
    found = {name: estimate_memory(candidate, SIZES, num_tasks=5) for name, candidate in by_name().items()}
    assert found["finetune"] == 1000 + 10 + 30
    assert found["routed"] == 1000 + 50 + 30
    assert found["finetune_full"] == 1000 + 3 * 800


def test_sizes_are_those_of_the_model_and_of_an_expert_that_a_method_attaches():
    model, _ = build("llava")
    sizes = measure_sizes(model)
    assert sizes.model == sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert sizes.model > sizes.decoder > sizes.expert
    METHODS["finetune"](model, settings=TrainSettings()).mixtures.train_expert("shared")
    assert sizes.expert == sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_full_fine_tuning_learns_at_a_tenth_of_the_rate():
    assert by_name()["finetune_full"].choice.train == {"learning_rate": pytest.approx(1e-4)}


def line(name, score, *, seconds=60.0, lost=0.0, spread=0.0, memory=1):
    interval = Interval(low=lost - spread, high=lost + spread)
    return Line(name=name, memory=memory, score=score, num_samples=9, lost=lost, lost_interval=interval, seconds=seconds)


def test_the_best_score_wins_where_it_is_clear():
    lines = [line("cheap", 0.5, seconds=1), line("dear", 0.9, seconds=9)]
    assert decide(lines, is_clear=lambda best, other: True) == ("dear", ["dear"])


def test_of_what_cannot_be_told_apart_the_cheapest_is_taken():
    lines = [line("cheap", 0.5, seconds=1), line("dear", 0.9, seconds=9), line("cheaper", 0.1, seconds=0.5)]
    assert decide(lines, is_clear=lambda best, other: other == "cheaper") == ("cheap", ["cheap", "dear"])


def test_where_times_are_about_equal_less_memory_decides():
    lines = [line("large", 0.5, seconds=1, memory=9), line("small", 0.5, seconds=1.2), line("slow", 0.5, seconds=2, memory=0)]
    assert decide(lines, is_clear=lambda best, other: False)[0] == "small"


def test_time_in_full_grows_with_the_steps_but_not_with_what_is_only_looked_at():
    trained = {"steps": 10, "samples_seen": 40, "seconds": 8.0}
    assert extrapolate_seconds([trained], batch_size=4, factor=6) == pytest.approx(48)
    half_looking = {"steps": 10, "samples_seen": 160, "seconds": 8.0}  # 120 samples forward only: as long as 40 that are learnt
    assert extrapolate_seconds([half_looking, trained], batch_size=4, factor=6) == pytest.approx(4 * 6 + 4 + 48)


def test_what_is_out_is_not_recommended_and_nothing_is_where_all_is_out():
    out = replace(line("best", 0.9), out="too large")
    assert decide([out, line("second", 0.2)], is_clear=lambda best, other: True)[0] == "second"
    assert decide([out], is_clear=lambda best, other: True) == (None, [])


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        (line("fits", 0.5), ""),
        (line("slow", 0.5, seconds=7201), "would train for 2 h"),
        (line("loses", 0.5, lost=0.05, spread=0.03), "loses 5.0 points"),
        (line("unsure", 0.5, lost=0.0, spread=0.03), "may lose 3.0 points"),
        (replace(line("unmeasured", 0.5, lost=float("nan")), lost_interval=None), ""),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_time_and_base_forgetting_put_a_method_out_with_a_reason(measured, says):
    found = judge(measured, Limits(seconds=7200, base_forgetting=1.0)).out
    assert found.startswith(says) if says else found == ""


def test_amounts_are_read_with_their_units():
    assert read_amount("16GB", BYTES, option="--memory", example="16GB") == 16e9
    assert read_amount("1.5 h", SECONDS, option="--time", example="2h") == 5400
    assert read_amount(None, SECONDS, option="--time", example="2h") is None
    for wrong in ("16", "GB", "16 pounds", "0GB", "-1GB"):
        with pytest.raises(UserError, match="--memory 16GB"):
            read_amount(wrong, BYTES, option="--memory", example="16GB")


def alula(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A tiny model and two data files."""
    folder = tmp_path_factory.mktemp("desk")
    model, processor = build("llava")
    model.save_pretrained(folder / "tiny")
    processor.save_pretrained(folder / "tiny")
    for name, colours in (("colours", ["red", "green"]), ("shades", ["black", "white"])):
        rows = []
        for index in range(24):
            Image.new("RGB", (30 + index, 30), colours[index % 2]).save(folder / f"{name}{index}.png")
            rows.append({"image": f"{name}{index}.png", "question": f"Which of {name}?", "answer": colours[index % 2]})
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def command(desk):
    tasks = [word for name in ("colours", "shades") for word in ("--task", f"{name}={desk / name}.jsonl")]
    pilot = ("--pilot-size", 4, "--pilot-steps", 1, "--set", "steps=5", "--set", "batch_size=2")
    return ("recommend", *tasks, "--base-task", "capital", "--model", desk / "tiny", *pilot, "--max-base-forgetting", 100)


@pytest.fixture(scope="module")
def made(desk, command):
    """A finished recommendation: what was said, and its folder."""
    result = alula(*command, "--memory", "16GB", "--time", "2h", "--out", desk / "found")
    assert result.exit_code == 0, result.output
    return result, desk / "found"


def test_a_recommendation_shows_its_numbers_and_says_that_the_pilot_is_short(made):
    result, folder = made
    found = read_json(folder / "recommendation.json")
    assert found["chosen"] in {"finetune", "routed", "finetune_full"}
    assert found["rule"] == RULE
    for said in (f"Recommended: {found['chosen']}", "n = ", "cannot be told apart", "The pilot is short: 1 of 5 steps"):
        assert said in result.stdout
    assert "are noise here" in result.stdout or "All methods have the same score" in result.stdout
    assert "joint is out: it needs data of earlier tasks, which may not be kept." in result.stdout


def test_every_number_comes_from_the_pilots_run_folder(made):
    _, folder = made
    lines = {row["name"]: row for row in read_json(folder / "recommendation.json")["candidates"]}
    assert {path.name for path in (folder / "pilot" / "cells").iterdir()} == {f"{n}-seed0" for n in ("finetune", "routed", "finetune_full")}
    for name in ("finetune", "routed", "finetune_full"):
        costs = read_jsonl(folder / "pilot" / "cells" / f"{name}-seed0" / "cost.jsonl")
        taken = sum(row["seconds"] for row in costs)
        assert taken < lines[name]["seconds"] <= 5 * taken * 1.0001
        assert sum(row["steps"] for row in costs) == 2
    assert lines["joint"]["score"] is None


def test_the_recipe_is_ready_for_run_on_all_data(made, desk):
    _, folder = made
    recipe = read_recipe(folder / "recipe.yaml")
    assert [choice.shown for choice in recipe.methods] == [read_json(folder / "recommendation.json")["chosen"]]
    assert recipe.train.steps == 5
    assert all(choice.train_size is None and choice.path.is_absolute() for choice in recipe.tasks)
    assert yaml.safe_load((folder / "pilot" / "recipe.yaml").read_text())["tasks"][0]["train_size"] == 4
    assert alula("run", folder / "recipe.yaml", "--out", desk / "run", "--set", "train.steps=1").exit_code == 0


def test_the_same_command_again_trains_nothing_and_says_the_same(made, command):
    result, folder = made
    again = alula(*command, "--memory", "16GB", "--time", "2h", "--out", folder)
    assert "done already" in again.stderr
    assert ": running" not in again.stderr
    assert again.stdout == result.stdout


def test_where_nothing_is_allowed_nothing_is_trained_and_the_exit_code_is_1(desk, command):
    result = alula(*command, "--memory", "1KB", "--out", desk / "none")
    assert result.exit_code == 1
    assert "No method can be recommended" in result.stdout
    assert not (desk / "none" / "pilot").exists()
    assert not (desk / "none" / "recipe.yaml").exists()
    assert json.loads((desk / "none" / "recommendation.json").read_text())["chosen"] is None
