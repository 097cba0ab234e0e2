"""A two-task run of two processes, killed (SIGKILL) at random moments and resumed; says which files differ from an uninterrupted run.

python tests/kill_worker.py FOLDER [--kills 20] [--seed 0]

The run is cut into as many stretches of time as there are kills, and each kill falls somewhere into its own. It is a real one: processes
that were alive died of it. A run that was over before its kill is no test; it is thrown away and killed earlier, until the kill is real.

Each process is forked from this one, which has imported everything, and gets the environment that torchrun would give it.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from alula.cli import main as command_line
from alula.files import read_json, read_jsonl, write_json, write_text
from distributed_worker import write_world
from few_prompts import few_general_prompts
from zoo import build

NUM_PROCESSES = 2
TRIES = 8
"""How often the moment of one kill may come too late."""
TIMES = ("seconds", "seconds_of_this_process")


def write_recipe(folder):
    """Two tasks, an expert each, a checkpoint every two steps."""
    write_world(folder)
    raw = yaml.safe_load((folder / "recipe.yaml").read_text())
    raw["methods"] = [
        {"name": "routed", "options": {"rank": 2, "layers": [1, 2]}, "with": [{"name": "rehearsal", "options": {"ratio": 0.5}}]}
    ]
    raw["train"] = {"steps": 6, "batch_size": 4, "save_every": 2, "learning_rate": 1e-2}
    write_text(folder / "recipe.yaml", yaml.safe_dump(raw))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(recipe, out, said):
    """The processes of one launch of `alula run`."""
    port, pids = free_port(), []
    for rank in range(NUM_PROCESSES):
        pid = os.fork()
        if pid == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_PROCESSES, "LOCAL_WORLD_SIZE": NUM_PROCESSES}
            os.environ.update({name: str(value) for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()})
            with open(said, "a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.argv = ["alula", "run", str(recipe), "--out", str(out)]
            code = 1
            try:
                command_line()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    return pids


def finish(pids, *, until=None):
    """Waits for all, or kills what still runs at `until`; gives how many died of that.

    Raises:
        ChildProcessError: one ended badly by itself.
    """
    codes = {}
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = status
        failed = any(codes.values())
        if failed or (until is not None and time.monotonic() > until):  # torchrun as well ends all when one has died
            alive = set(pids) - set(codes)
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            codes |= {pid: os.waitpid(pid, 0)[1] for pid in alive}
            if failed:
                raise ChildProcessError(f"ended by themselves, with {codes}")
            return sum(os.WIFSIGNALED(codes[pid]) and os.WTERMSIG(codes[pid]) == signal.SIGKILL for pid in alive)
        time.sleep(0.01)
    if any(codes.values()):
        raise ChildProcessError(f"ended by themselves, with {codes}")
    return 0


def contents(folder):
    """What every file says, times left out: its digest by name."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".html"):
        if path.suffix == ".safetensors":
            said = repr({name: (value.dtype, value.tolist()) for name, value in sorted(load_file(path).items())})
        elif path.suffix in (".json", ".jsonl"):
            said = json.dumps(timeless(read_json(path) if path.suffix == ".json" else read_jsonl(path)))
        else:
            said = path.read_bytes().hex()
        found[str(path.relative_to(folder))] = hashlib.sha256(said.encode()).hexdigest()
    return found


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(inner) for key, inner in value.items() if key not in TIMES}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    write_recipe(given.folder)
    build("llava")  # what a process would import only now is there for all
    with few_general_prompts():
        kill_and_resume(given.folder, kills=given.kills, chance=random.Random(given.seed))


def kill_and_resume(folder, *, kills, chance):
    """Writes ``moments.json``: when each kill came, and what differs after the same command has run again."""
    world = World(folder / "recipe.yaml", folder / "said.txt")
    length = 0.9 * world.run(folder / "whole")  # the first run is slower: files and code are not in memory yet
    whole, moments = contents(folder / "whole"), []
    for number in range(kills):
        out = folder / f"killed-{number:02d}"
        moment = world.kill(out, lambda number=number: (number + chance.random()) / kills, length=length)
        world.run(out)
        found = contents(out)
        differ = sorted(name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name))
        moments.append({**moment, "differ": differ})
        print(moments[-1], flush=True)
        if not differ:
            shutil.rmtree(out)
    write_json(folder / "moments.json", {"files": len(whole), "seconds": round(length, 2), "moments": moments})


class World:
    """The command, to be run to its end or killed."""

    def __init__(self, recipe, said):
        self.recipe, self.said = recipe, said

    def run(self, out):
        """To the end; the seconds that it took."""
        began = time.monotonic()
        try:
            finish(start(self.recipe, out, self.said))
        except ChildProcessError as error:
            raise RuntimeError(self.said.read_text()) from error
        return time.monotonic() - began

    def kill(self, out, share, *, length):
        """Kills a run into `out` at a drawn share of `length` seconds, shorter ones until it hits: what it left, and where."""
        for _ in range(TRIES):
            shutil.rmtree(out, ignore_errors=True)
            began, delay = time.monotonic(), share() * length
            left = finish(start(self.recipe, out, self.said), until=began + delay)
            if left and not list(out.glob("cells/*/done.json")):
                written = [(path.stat().st_mtime, str(path.relative_to(out))) for path in out.rglob("*") if path.is_file()]
                last = max(written, default=(0, "nothing yet"))[1]
                return {"seconds": round(delay, 2), "killed": left, "last_written": last}
            length = min(length, time.monotonic() - began)
        raise RuntimeError(f"the run was over before each of {TRIES} kills")


if __name__ == "__main__":
    main()
