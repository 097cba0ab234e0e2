"""Attached experts train under DeepSpeed's own engine, by transformers' Trainer, as they train in one plain process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alula.files import read_json
from deepspeed_worker import STAGES, train

WORKER = Path(__file__).with_name("deepspeed_worker.py")


@pytest.mark.slow
def test_two_processes_under_deepspeed_learn_what_one_without_it_learns(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is no dependency: it comes as source alone")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = tmp_path / "found.json"
    done = subprocess.run([*launcher, WORKER, out], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = train(tmp_path, batch_size=4, use_cpu=True)
    assert alone["engine"] == "LlavaForConditionalGeneration" and alone["processes"] == 1
    for stage in STAGES:
        shared = read_json(out)[str(stage)]
        assert (shared["engine"], shared["stage"], shared["processes"]) == ("DeepSpeedEngine", stage, 2)
        assert shared["losses"] == pytest.approx(alone["losses"], abs=1e-4)
        assert shared["sums"] == pytest.approx(alone["sums"], abs=1e-3)
