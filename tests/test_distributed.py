"""Two processes, data-parallel or with a sharded model, give what one process gives; what cannot be shared out is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alula.cli.launched import check_verb, launched
from alula.config import read_recipe
from alula.data.readers import read_task
from alula.errors import UserError
from alula.files import read_json, read_jsonl
from alula.pool import Pool
from alula.running.run import run_recipe
from alula.training.order import Steps
from distributed_worker import METHOD_CHOICES, full_training, learn, write_world

WORKER = Path(__file__).with_name("distributed_worker.py")
METHODS = [choice["name"] for choice in METHOD_CHOICES]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The runs of one process and of two, data-parallel (by the command line) and sharded."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    assert run_recipe(read_recipe(folder / "recipe.yaml"), folder / "one", say=lambda line: None, fail_fast=True) == 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, WORKER, folder], env=environment, capture_output=True, text=True, timeout=900)
    (folder / "said.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def cell(folder, method):
    return folder / "cells" / f"{method}-seed0"


@pytest.mark.parametrize("stage", ["expert", "train"], ids=["routed", "finetune_full"])
def test_in_this_world_a_process_has_steps_without_any_image_while_the_other_has_one(tmp_path, stage):
    """What hangs or differs elsewhere, the tests below go through: who has an image, by the order in which the runs draw."""
    write_world(tmp_path)
    recipe = read_recipe(tmp_path / "recipe.yaml")
    shown = set()
    for choice in recipe.tasks:
        train = read_task(choice.name, choice.path, test_path=choice.test_path).train
        for step in range(recipe.train.steps):
            sizes = {"batch_size": recipe.train.batch_size, "micro_batch_size": None, "num_processes": 2}
            shares = [
                Steps(train, list, **sizes, seed=0, task=choice.name, stage=stage, process_index=index)[step][0] for index in range(2)
            ]
            shown.add(tuple(any(sample.images for sample in share) for share in shares))
    assert {True, False} in [set(pair) for pair in shown], "no step has an image on one process alone: choose other rows or another seed"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["spread", "sharded"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_have_the_losses_of_one(world, form, method):
    alone, shared = (read_jsonl(cell(world / run, method) / "losses.jsonl") for run in ("one", form))
    assert len(alone) == len(shared) >= 6
    for left, right in zip(alone, shared, strict=True):
        assert (left["targets"], left["learning_rate"]) == (right["targets"], right["learning_rate"])
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
        assert left.get("parts", {}) == pytest.approx(right.get("parts", {}), abs=1e-5)
        assert left["gradient_norm"] == pytest.approx(right["gradient_norm"], rel=1e-3, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["spread", "sharded"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_say_and_score_what_one_does(world, form, method):
    alone, shared = cell(world / "one", method), cell(world / form, method)
    kept = sorted(path.relative_to(alone) for path in alone.rglob("*.jsonl") if path.name not in ("losses.jsonl", "cost.jsonl"))
    assert len(kept) >= 6
    for path in kept:
        left, right = ([{**row, "seconds": 0} for row in read_jsonl(folder / path)] for folder in (alone, shared))
        assert left == right, path
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (alone, shared)]
    assert files[0] == files[1]


@pytest.mark.slow
def test_one_process_speaks_for_both(world):
    assert (world / "said.txt").read_text().count("Report:") == 1


@pytest.mark.slow
def test_sharded_training_that_was_cut_goes_on_sharded_or_in_one_process(world):
    assert len(read_jsonl(world / "cut" / "losses.jsonl")) == 3
    full_training(world / "whole")
    full_training(world / "cut")
    whole, alone, sharded = ([row["loss"] for row in read_jsonl(world / name / "losses.jsonl")] for name in ("whole", "cut", "again"))
    assert len(whole) == 4
    assert alone == pytest.approx(whole, abs=1e-5)
    assert sharded == pytest.approx(whole, abs=1e-5)


@pytest.mark.slow
def test_pool_taught_by_two_processes_is_that_of_one(world):
    learn(world, world / "pool-of-one")
    alone, shared = Pool.open(world / "pool-of-one"), Pool.open(world / "pool")
    assert shared.manifest["base"]["fingerprint"] == alone.manifest["base"]["fingerprint"]
    assert shared.names == ["colours"]
    losses = [read_jsonl(pool.folder / "learning" / "colours" / "losses.jsonl") for pool in (alone, shared)]
    assert [row["loss"] for row in losses[0]] == pytest.approx([row["loss"] for row in losses[1]], abs=1e-5)
    said = [(pool.folder / "experts" / "colours" / "predictions.jsonl").read_text() for pool in (alone, shared)]
    assert said[0] == said[1]


@pytest.mark.slow
def test_method_that_cannot_be_sharded_is_refused_and_loses_no_other(world):
    assert read_json(world / "crashed.json") == 1
    error = read_json(cell(world / "sharded", "lora") / "crashed.json")["error"]
    assert "MergedLoRA reads or changes the model's weights as a whole" in error
    assert "finetune, finetune_full, joint, joint_full, routed, specialist" in error


@pytest.mark.parametrize("verb", [["report", "x"], ["list"], []])
def test_verbs_of_one_process_are_refused_in_several(monkeypatch, verb):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="learn, pretrain, run together"):
        check_verb(verb)
    check_verb(["run", "recipe.yaml"])


def test_launchers_engine_that_would_go_wrong_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="add --fsdp_version 2"), launched():
        pass
