"""Ctrl-C while several workers run: everything ends at once, and the same command goes on to the numbers of an undisturbed run."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from alula.config import write_recipe
from alula.running.run import run_recipe
from tiny_runs import LORA, ORDERS, measured, recipe, save_tiny

# A terminal's processes take SIGINT; what a script starts in the background, as this suite may be, inherits that it is ignored.
LIKE_IN_A_TERMINAL = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
COMMAND = [sys.executable, "-c", f"{LIKE_IN_A_TERMINAL}; from alula.cli import main; main()", "compare"]


@pytest.fixture
def one_thread():
    """As many threads as each of two workers has on a small machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_ctrl_c_with_two_workers_leaves_a_folder_that_goes_on_to_the_same_numbers(tmp_path, one_thread):
    train = {"steps": 25, "batch_size": 2, "learning_rate": 1e-2, "save_every": 5}
    wanted = recipe(save_tiny(tmp_path / "tiny"), methods=[LORA], orders=ORDERS, train=train)
    (tmp_path / "r.yaml").write_text(write_recipe(wanted))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_recipe(wanted, whole, say=lambda line: None, fail_fast=True) == 0
    cells = [cut / "cells" / name for name in ("finetune-seed0", "finetune-seed0-order1")]
    shutil.copytree(whole / "base", cut / "base")  # row 0 is there, so both start at once
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, str(tmp_path / "r.yaml"), "--out", str(cut), "--workers", "2"]
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while run.poll() is None and not any((cell / "checkpoint" / "state.json").exists() for cell in cells):
        time.sleep(0.05)
    workers = psutil.Process(run.pid).children(recursive=True)
    os.killpg(run.pid, signal.SIGINT)  # what a terminal does
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert "the same command again goes on" in said and "Traceback" not in said
    assert len(workers) == 2 and not any(worker.is_running() for worker in workers)
    assert not list(cut.rglob("crashed.json"))
    assert not all((cell / "done.json").exists() for cell in cells)
    assert run_recipe(wanted, cut, say=lambda line: None) == 0
    assert not list(cut.rglob("*.part"))
    for cell in cells:
        assert measured(cell) == measured(whole / "cells" / cell.name)
