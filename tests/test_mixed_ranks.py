"""Two processes under other people's trainers, one with images and one without, do not wait for ever; nor under their launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alula.config import read_recipe
from alula.files import read_json, read_jsonl, write_text
from alula.running.run import run_recipe
from distributed_worker import METHOD_CHOICES, write_world
from mixed_ranks_worker import CASES

WORKER = Path(__file__).with_name("mixed_ranks_worker.py")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What two processes did; one that waits for the other gives up after some seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    write_world(folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    write_text(folder / "recipe.yaml", yaml.safe_dump({**recipe, "tasks": recipe["tasks"][:1], "methods": [METHOD_CHOICES[-1]]}))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    done = subprocess.run([*launcher, WORKER, folder], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_mean_of_both_though_one_batch_leaves_parts_out(world, case):
    found = read_json(world / "found.json")[case]
    assert found["off"] < 1e-6 < found["largest"]


@pytest.mark.slow
def test_transformers_trains_learners_with_recomputed_activations(world):
    losses = read_json(world / "found.json")["losses"]
    assert len(losses) == 4 and losses[-1] < losses[0]


@pytest.mark.slow
def test_a_run_that_accelerate_launched_has_the_losses_of_one_process(world):
    assert run_recipe(read_recipe(world / "recipe.yaml"), world / "one", say=lambda line: None, fail_fast=True) == 0
    alone, shared = (read_jsonl(world / run / "cells" / "finetune_full-seed0" / "losses.jsonl") for run in ("one", "two"))
    assert len(alone) >= 3
    assert [row["loss"] for row in shared] == pytest.approx([row["loss"] for row in alone], abs=1e-5)
