"""`alula recommend` from end to end at its default limit, on a tiny model that was taught what most methods then make it forget."""

import json

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from alula.cli.app import app
from alula.config import read_recipe
from alula.data.collate import Collator
from alula.data.sample import Sample
from alula.files import read_json, read_jsonl, write_jsonl
from alula.running.candidates import RULE, candidates
from alula.running.memory import Sizes, estimate_memory
from alula.training import TrainSettings
from zoo import build

COUNTRIES = ("France", "Peru", "Chad", "Spain", "Cuba", "Iran", "Mali", "Laos", "Togo", "Fiji", "Oman", "Iraq")
FORGET = {"finetune", "msgm", "finetune_full", "soft_targets"}
OLD_DATA = {"joint", "joint_full", "rehearsal", "msgm_rehearsal"}


def alula(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def question(country):
    return f"What is the sea of {country} like?"


def teach(model, processor):
    """Every sea is blue: the head alone learns it, which no method trains. It speaks loudly enough for an expert to say another word."""
    model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.lm_head.weight.data *= 20
    batch = Collator(processor)([Sample.ask(question(country), "blue") for country in COUNTRIES])
    optimizer = torch.optim.AdamW(model.lm_head.parameters(), lr=2e-2)
    for _ in range(25):
        model(**batch).loss.backward()
        optimizer.step()
        model.zero_grad()


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The model; two tasks with images, in which all is red; two base tasks: seas that are blue, and seas of which half are red."""
    folder = tmp_path_factory.mktemp("desk")
    model, processor = build("llava")
    teach(model, processor)
    model.save_pretrained(folder / "tiny")
    processor.save_pretrained(folder / "tiny")
    for name in ("colours", "shades"):
        for index in range(24):
            Image.new("RGB", (30 + index, 30), "red").save(folder / f"{name}{index}.png")
        rows = [{"image": f"{name}{index}.png", "question": f"Which of {name}?", "answer": "red"} for index in range(24)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    for name, answers in (("blue", ["blue"]), ("mixed", ["blue", "red"])):
        (folder / name).mkdir()
        rows = [{"question": question(country), "answer": answers[index % len(answers)]} for index, country in enumerate(COUNTRIES)]
        write_jsonl(folder / name / "test.jsonl", rows)
        write_jsonl(folder / name / "train.jsonl", [{"question": "What is a sea like?", "answer": "blue"}])
    return folder


@pytest.fixture(scope="module")
def command(desk):
    tasks = [word for name in ("colours", "shades") for word in ("--task", f"{name}={desk / name}.jsonl")]
    settings = [word for one in ("steps=50", "batch_size=4", "learning_rate=0.005") for word in ("--set", one)]
    return ("recommend", *tasks, "--model", desk / "tiny", "--pilot-size", 12, "--pilot-steps", 10, *settings)


@pytest.fixture(scope="module")
def made(desk, command):
    """A finished recommendation without old data: what was said, and its folder."""
    result = alula(*command, "--base-task", f"blue={desk / 'blue'}", "--memory", "16GB", "--time", "2h", "--out", desk / "found")
    assert result.exit_code == 0, result.output
    return result, desk / "found"


@pytest.fixture(scope="module")
def kept(desk, command):
    """The same where old data may be kept, and where as many base answers become right as wrong."""
    result = alula(*command, "--base-task", f"mixed={desk / 'mixed'}", "--keep-old-data", "--out", desk / "kept")
    assert result.exit_code == 0, result.output
    return result, desk / "kept"


def lines(folder):
    return {row["name"]: row for row in read_json(folder / "recommendation.json")["candidates"]}


def cells(folder):
    return {path.name.removesuffix("-seed0"): path for path in (folder / "pilot" / "cells").iterdir()}


def test_at_the_default_limit_what_forgets_is_out_and_what_keeps_the_base_is_recommended(made):
    result, folder = made
    found = lines(folder)
    assert set(cells(folder)) == {*FORGET, "routed"}
    assert {name for name in FORGET if found[name]["lost_interval"]["low"] > 0.01} == FORGET
    assert {name for name, line in found.items() if line["out"]} == FORGET | OLD_DATA
    assert (found["routed"]["out"], found["routed"]["unsure"], found["routed"]["lost"]) == ("", "", 0)
    assert read_json(folder / "recommendation.json")["chosen"] == "routed"
    for said in ("Recommended: routed", "finetune is out: it loses 100.0 points on base tasks, and 1 may be lost."):
        assert said in result.stdout
    assert "joint is out: it needs data of earlier tasks, which may not be kept." in result.stdout


def test_with_old_data_what_may_forget_stays_possible_and_goes_after_what_does_not(kept):
    result, folder = kept
    found = lines(folder)
    assert set(cells(folder)) == set(found) == {*FORGET, *OLD_DATA, "routed"}
    for name, line in found.items():
        low, high = line["lost_interval"]["low"], line["lost_interval"]["high"]
        assert (bool(line["out"]), bool(line["unsure"])) == (low > 0.01, low <= 0.01 < high), name
    for name in ("finetune", "finetune_full"):
        assert (found[name]["score"], found[name]["lost"]) == (1, 0)  # half of the base answers became wrong, the others right
        assert f"{name} is possible: it may lose up to " in result.stdout
        assert "of their samples would tell, here were 12" in found[name]["unsure"]
    assert min(found, key=lambda name: found[name]["seconds"]) != "routed"
    assert read_json(folder / "recommendation.json")["chosen"] == "routed"
    assert "of those that keep the limit it costs least" in result.stdout


def test_what_was_lost_and_learnt_is_what_the_pilots_predictions_say(made, kept):
    for _, folder in (made, kept):
        base = {path.stem: mean(read_jsonl(path)) for path in (folder / "pilot" / "base").glob("*.jsonl")}
        for name, cell in cells(folder).items():
            arm = next(path for path in (cell / "predictions").glob("row0[12]/*") if path.parent.name == last(cell))
            after = {path.stem: mean(read_jsonl(path)) for path in arm.glob("*.jsonl")}
            (own,) = {"blue", "mixed"} & set(after)
            line = lines(folder)[name]
            assert line["lost"] == pytest.approx(base[own] - after[own])
            assert line["score"] == pytest.approx((after["colours"] + after["shades"]) / 2)
            assert line["num_base"] == 12


def last(cell):
    return max(path.name for path in (cell / "predictions").glob("row*"))


def mean(rows):
    return sum(row["score"] for row in rows) / len(rows)


def test_time_and_memory_of_the_full_training_follow_from_the_pilot(made):
    _, folder = made
    found, numbers = lines(folder), read_json(folder / "recommendation.json")
    sizes = Sizes(**numbers["sizes"])
    assert sizes.batch > 0
    ranks = {candidate.name: candidate.rank for candidate in candidates(TrainSettings())}
    for name, cell in cells(folder).items():
        costs = read_jsonl(cell / "cost.jsonl")
        taken = sum(row["seconds"] for row in costs)
        assert taken < found[name]["seconds"] <= 5 * taken * 1.0001
        assert sum(row["steps"] for row in costs) == 20
        assert found[name]["memory"] == estimate_memory(sizes, rank=ranks[name], num_experts=2 if name == "routed" else 1)
    assert found["joint"]["score"] is None
    assert numbers["rule"] == RULE
    assert "The pilot is short: 10 of 50 steps" in made[0].stdout


def test_the_recipe_is_ready_for_run_on_all_data(made, desk):
    _, folder = made
    recipe = read_recipe(folder / "recipe.yaml")
    assert [choice.shown for choice in recipe.methods] == [read_json(folder / "recommendation.json")["chosen"]]
    assert recipe.train.steps == 50
    assert all(choice.train_size is None and choice.path.is_absolute() for choice in recipe.tasks)
    assert yaml.safe_load((folder / "pilot" / "recipe.yaml").read_text())["tasks"][0]["train_size"] == 12
    assert alula("run", folder / "recipe.yaml", "--out", desk / "run", "--set", "train.steps=1").exit_code == 0


def test_the_same_command_again_trains_nothing_and_says_the_same(made, desk, command):
    result, folder = made
    again = alula(*command, "--base-task", f"blue={desk / 'blue'}", "--memory", "16GB", "--time", "2h", "--out", folder)
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
