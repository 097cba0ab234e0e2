"""Methods x seeds x orders: which cells there are, and that they give the same numbers wherever they run."""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from alula.cli.app import app
from alula.config import check_recipe, read_recipe, write_recipe
from alula.errors import UserError
from alula.files import read_json, read_jsonl
from alula.report.reading import read_run
from alula.running import parallel
from alula.running.cells import find_cell, list_cells
from alula.running.parallel import Processes, affordable_workers, dispatch, threads_each
from alula.running.run import run_recipe, start_folder
from alula.running.worker import _end_with_parent
from tiny_runs import LORA, ORDERS, measured, recipe, save_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny random LLaVA and its processor."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def serial(tiny, tmp_path_factory):
    """Three cells, one after another in this process, with the one thread that each of two workers has on a small machine."""
    folder, threads = tmp_path_factory.mktemp("serial"), torch.get_num_threads()
    methods = [LORA, {**LORA, "label": "together", "joint": True}, {"name": "joint", "options": LORA["options"], "orders": [0]}]
    torch.set_num_threads(1)
    try:
        assert run_recipe(recipe(tiny, methods=methods), folder, say=lambda line: None, fail_fast=True) == 0
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture
def one_thread(monkeypatch):
    """Workers have one thread each, whatever the machine."""
    monkeypatch.setattr(parallel, "num_cores", lambda: 1)


def test_the_cells_are_methods_x_seeds_x_orders(tmp_path):
    methods = ["finetune", {"name": "routed", "orders": [1]}, {"name": "finetune", "label": "together", "joint": True}]
    raw = {"tasks": ["easy_vqa", "digits"], "orders": ORDERS, "methods": methods, "seeds": [0, 5]}
    cells = {cell.name: cell for cell in list_cells(check_recipe(raw), tmp_path)}
    assert list(cells) == [
        *("finetune-seed0", "together-seed0", "finetune-seed0-order1", "routed-seed0-order1"),
        *("finetune-seed5", "together-seed5", "finetune-seed5-order1", "routed-seed5-order1"),
    ]
    assert cells["routed-seed5-order1"].tasks == ("digits", "easy_vqa")
    assert cells["together-seed0"].joint
    assert find_cell(check_recipe(raw), tmp_path, "finetune-seed5-order1").seed == 5
    with pytest.raises(UserError, match="Did you mean 'finetune-seed0'"):
        find_cell(check_recipe(raw), tmp_path, "finetune-sed0")


def test_without_orders_the_cells_are_named_and_made_as_ever(tmp_path):
    plain = check_recipe({"tasks": ["easy_vqa", "digits"], "methods": ["finetune"]})
    (cell,) = list_cells(plain, tmp_path)
    assert (cell.name, cell.tasks, cell.joint) == ("finetune-seed0", (), False)
    assert repr(plain.methods[0]) == "MethodChoice(name='finetune', options={}, train={})"  # what checkpoints are known by


def test_a_method_that_arranges_its_stream_itself_is_not_made_joint(tmp_path):
    raw = {"tasks": ["easy_vqa"], "methods": [{"name": "joint", "joint": True}]}
    with pytest.raises(UserError, match="arranges its stream itself"):
        list_cells(check_recipe(raw), tmp_path)


def test_each_order_is_learnt_as_it_says(serial):
    for order, tasks in enumerate(ORDERS):
        cell = serial / "cells" / ("finetune-seed0" + (f"-order{order}" if order else ""))
        assert read_json(cell / "order.json") == {"tasks": tasks}
        after = {row["row"]: row["after"] for row in read_jsonl(cell / "scores.jsonl")}
        assert after == {0: None, 1: tasks[0], 2: tasks[1]}
        assert [row["task"] for row in read_jsonl(cell / "cost.jsonl")] == tasks


def test_joint_makes_of_finetune_what_the_method_joint_is(serial):
    ours, theirs = serial / "cells" / "together-seed0", serial / "cells" / "joint-seed0"
    assert not (serial / "cells" / "together-seed0-order1").exists()
    assert {(row["row"], row["after"]) for row in read_jsonl(ours / "scores.jsonl")} == {(0, None), (1, "joint")}
    assert [row["steps"] for row in read_jsonl(ours / "cost.jsonl")] == [2]
    assert read_jsonl(ours / "losses.jsonl") == read_jsonl(theirs / "losses.jsonl")
    rows = [[(row["task"], row["score"]) for row in read_jsonl(cell / "scores.jsonl")] for cell in (ours, theirs)]
    assert rows[0] == rows[1]


def test_two_workers_give_what_one_process_gives_to_the_bit_and_skip_what_is_done(tiny, serial, tmp_path, one_thread):
    wanted, folder, said = recipe(tiny, methods=[LORA]), tmp_path / "run", []
    shutil.copytree(serial / "base", folder / "base")  # row 0 is there, so both start at once
    assert run_recipe(wanted, folder, say=said.append, workers=2) == 0
    for name in ("finetune-seed0", "finetune-seed0-order1"):
        assert measured(folder / "cells" / name) == measured(serial / "cells" / name), name
        assert not (folder / "cells" / name / "worker.log").exists()
    assert {line.partition(": ")[2] for line in said} == {"running", "done"}
    said.clear()
    assert run_recipe(wanted, folder, say=said.append, workers=2) == 0
    assert said == ["finetune-seed0: done already", "finetune-seed0-order1: done already"]


class Killer(Processes):
    """Kills the first cell as soon as it runs, as a system does that has no memory left."""

    def start(self, cell):
        super().start(cell)
        if cell.name == "finetune-seed0":
            os.kill(self._running[-1][1].pid, signal.SIGKILL)


def test_a_killed_worker_is_a_crashed_cell_and_the_others_go_on(tiny, tmp_path):
    methods = [LORA, {"name": "finetune", "label": "wrong", "options": {"layers": [99]}}, {**LORA, "label": "good"}]
    wanted, folder, said = recipe(tiny, methods=methods, orders=[]), tmp_path / "run", []
    start_folder(wanted, folder)
    cells = list_cells(wanted, folder)
    assert dispatch(cells, Killer(folder, workers=3), has_base=lambda: True, say=said.append) == 2
    killed, wrong, good = (folder / "cells" / f"{name}-seed0" for name in ("finetune", "wrong", "good"))
    assert "ended from outside (SIGKILL)" in read_json(killed / "crashed.json")["error"]
    assert "no decoder layer 99" in read_json(wrong / "crashed.json")["error"]
    assert (good / "done.json").exists()
    assert [line for line in said if "fewer --workers" in line]
    assert not list(folder.rglob("*.part"))
    assert {cell.name: cell.state for cell in read_run(folder).cells} == {
        "finetune-seed0": "crashed",
        "wrong-seed0": "crashed",
        "good-seed0": "finished",
    }


def test_until_row_zero_is_there_one_cell_runs_alone():
    class Recorder:
        limit, most = 3, 0

        def __init__(self):
            self.running = []

        def start(self, cell):
            self.running.append(cell)
            if not rows:
                assert len(self.running) == 1
            Recorder.most = max(Recorder.most, len(self.running))

        def ended(self):
            rows.append(0)
            return [(self.running.pop(0), None)]

        def stop(self):
            assert not self.running

    rows, cells = [], list_cells(check_recipe({"tasks": ["easy_vqa"], "methods": ["finetune"], "seeds": [0, 1, 2, 3, 4]}), Path("x"))
    assert dispatch(cells, Recorder(), has_base=lambda: bool(rows), say=lambda line: None) == 0
    assert Recorder.most == 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_worker_ends_when_its_parent_is_gone():
    reading, writing = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(writing)
        os.dup2(reading, 0)
        threading.Thread(target=_end_with_parent).start()
        time.sleep(90)
        os._exit(0)
    os.close(reading)
    os.close(writing)  # as the end of the parent does
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 1


def test_workers_share_memory_and_cores(tiny, monkeypatch):
    assert affordable_workers(recipe(tiny), most=1) == 1
    monkeypatch.setattr(parallel, "num_cores", lambda: 8)
    monkeypatch.setattr(parallel, "free_memory", lambda: 5 * 2**30)
    assert affordable_workers(recipe(tiny), most=9) == 4  # a tiny model: a bit over 1 GiB a cell
    monkeypatch.setattr(parallel, "free_memory", lambda: 2**20)
    assert affordable_workers(recipe(tiny), most=9) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [threads_each(count) for count in (1, 2, 3, 9)] == [8, 4, 2, 1]


@pytest.mark.parametrize(("option", "says"), [(("--workers", "0"), "(1 or more)"), (("--workers", "many"), "or auto is wanted")])
def test_a_wrong_number_of_workers_is_told(option, says, tiny, tmp_path):
    (tmp_path / "r.yaml").write_text(write_recipe(recipe(tiny)))
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"), *option])
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "run").exists()


def test_compare_runs_what_is_missing_and_builds_both_pages(tiny, serial, tmp_path):
    folder = shutil.copytree(serial, tmp_path / "run")
    command = ["compare", str(folder / "recipe.yaml"), "--out", str(folder)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("done already") == 4
    assert f"Comparison: {folder / 'compare.html'}" in result.stdout
    text = (folder / "compare.html").read_text()
    assert 'href="report.html"' in text
    assert "together" in text
    assert "Order 1: digits → easy_vqa" in text


def test_a_finished_comparison_grows_and_what_is_there_stays_as_it_is(tiny, serial, tmp_path):
    folder, said = shutil.copytree(serial, tmp_path / "run"), []
    before = {path: path.read_bytes() for path in folder.rglob("cells/**/*") if path.is_file()}
    kept = read_recipe(folder / "recipe.yaml").model_dump(by_alias=True)
    grown = check_recipe({**kept, "methods": [*kept["methods"], {**LORA, "label": "again", "orders": [1]}]})
    assert run_recipe(grown, folder, say=said.append) == 0
    assert [line for line in said if not line.endswith("done already")] == ["again-seed0-order1: running", "again-seed0-order1: done"]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert read_recipe(folder / "recipe.yaml") == grown
    rows = [read_jsonl(folder / "cells" / f"{name}-seed0-order1" / "losses.jsonl") for name in ("again", "finetune")]
    assert rows[0] == rows[1]


@pytest.fixture
def cluster(monkeypatch):
    """The address of a Ray cluster of one machine with two cores, to which nobody is connected yet."""
    utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    made = utils.Cluster(initialize_head=True, head_node_args=head)
    yield made.address
    made.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_ray_cluster_gives_what_this_process_gives(tiny, serial, tmp_path, monkeypatch, cluster):
    methods = [LORA, {"name": "finetune", "label": "wrong", "options": {"layers": [99]}}]
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(write_recipe(recipe(tiny, methods=methods, orders=ORDERS[:1])))
    shutil.copytree(serial / "base", Path("run", "base"))  # row 0 is there, so both start at once
    done = CliRunner().invoke(app, ["compare", "r.yaml", "--out", "run", "--ray", cluster, "--workers", "2"])
    assert done.exit_code == 1, done.output
    assert "1 cell crashed" in done.stderr
    assert measured(tmp_path / "run/cells/finetune-seed0") == measured(serial / "cells" / "finetune-seed0")
    assert "no decoder layer 99" in read_json(tmp_path / "run/cells/wrong-seed0/crashed.json")["error"]


def test_without_ray_the_option_says_what_to_install(monkeypatch):
    from alula.running.on_ray import connected

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install '\.\[cluster\]'"), connected("10.0.0.1:6379"):
        pass


@pytest.mark.filterwarnings("default")
def test_an_address_where_no_cluster_is_is_told_at_once():
    pytest.importorskip("ray")
    from alula.running.on_ray import connected

    with pytest.raises(UserError, match="No Ray cluster at '127"), connected("127.0.0.1:1"):
        pass
