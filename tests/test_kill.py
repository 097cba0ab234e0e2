"""`kill -9` at random moments of a two-task run of two processes with rehearsal: the same command again ends with the same files.

`python tests/kill_worker.py FOLDER --kills 20` does it twenty times.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alula.files import read_json

WORKER = Path(__file__).with_name("kill_worker.py")
KILLS = 2


@pytest.mark.slow
def test_run_killed_at_random_moments_resumes_to_the_same_files(tmp_path):
    """One kill in each half of the run; a run that was over before its kill does not count and is killed again, earlier."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, WORKER, tmp_path / "kills", "--kills", str(KILLS), "--seed", "5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_json(tmp_path / "kills" / "moments.json")
    assert found["files"] >= 15 and len(found["moments"]) == KILLS
    for moment in found["moments"]:
        assert moment["killed"] > 0, moment
        assert moment["differ"] == [], moment
