"""One process at a time changes a pool; a killed one leaves no lock behind."""

import os
import subprocess
import sys
import threading

import pytest

from alula.data.stream import Task
from alula.errors import UserError
from alula.pool import Pool
from alula.pool.lock import locked
from alula.running.alone import alone
from pool_of_one import folder, made, teach

__all__ = ["folder", "made"]

HOLD = """
import sys, time
from alula.pool.lock import locked
with locked(sys.argv[1], doing="learning 'birds'"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_change_one_pool_and_a_killed_one_leaves_no_lock(made, folder):
    _, _, _, mixtures, _ = made
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            pool = Pool.open(folder)  # reading needs no lock
            with pytest.raises(UserError, match=rf"being changed by process {holder.pid} on .*learning 'birds' since .*wait for it"):
                pool.add(mixtures, "copy", about={})
        finally:
            holder.kill()
    with locked(folder, doing="learning 'fish'"):
        assert "fish" in (folder / ".holder").read_text()
    assert not (folder / ".holder").exists()


def test_two_threads_wait_for_nobody_and_one_may_nest(tmp_path):
    refused = []

    def second():
        try:
            with locked(tmp_path / "pool", doing="b"):
                pass
        except UserError as error:
            refused.append(str(error))

    with locked(tmp_path / "pool", doing="a"), locked(tmp_path / "pool", doing="within a"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert refused and f"process {os.getpid()}" in refused[0]
    assert not (tmp_path / "pool").exists()  # nothing came of it


def test_learning_holds_the_pools_lock_and_writes_its_card(folder):
    @alone
    def learn(pool_folder, task):
        return (pool_folder / ".holder").read_text()

    assert "learning 'birds'" in learn(folder, Task(name="birds", train=[], test=[]))
    assert "| invoices |" in (folder / "README.md").read_text()


def test_an_expert_added_meanwhile_by_another_handle_is_kept(made, folder):
    _, _, _, mixtures, _ = made
    first, second = Pool.open(folder), Pool.open(folder)
    for pool, name in ((first, "one"), (second, "two")):
        teach(mixtures, name, seed=3)
        pool.add(mixtures, name, about={})
        mixtures.remove(name)
    assert Pool.open(folder).names == ["invoices", "one", "two"]
