"""A killed run resumes to the same numbers; a bad checkpoint is refused with words."""

import math
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from alula.data.collate import Collator
from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.files import read_json, read_jsonl
from alula.methods import METHODS
from alula.training import Trainer, TrainSettings
from resume_worker import SETTINGS, LastLayer, collate, pictures, stream, tiny_model, train
from zoo import build

WORKER = Path(__file__).with_name("resume_worker.py")


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return dict(trainer.model.state_dict())


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_same_run(resumed: Trainer, whole: Trainer, folder: Path, whole_folder: Path) -> None:
    assert weights(resumed).keys() == weights(whole).keys()
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert torch.equal(resumed.method.seen, whole.method.seen)
    assert (folder / "losses.jsonl").read_bytes() == (whole_folder / "losses.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9], ids=["in the first stage", "in the last stage"])
def test_resume_equals_uninterrupted(tmp_path, one_thread, step):
    whole = train(tmp_path / "whole")
    folder = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, WORKER, folder, "--die-at", "second", str(step)]
    killed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert len(read_jsonl(folder / "losses.jsonl")) == 10 + step  # one row more than at the checkpoint, to be cut off
    resumed = train(folder)
    assert_same_run(resumed, whole, folder, tmp_path / "whole")
    assert [learnt.task.name for learnt in resumed.learnt] == ["second"]
    cost, expected = resumed.learnt[0].cost, whole.learnt[1].cost
    assert (cost.steps, cost.samples_seen, cost.optimizer_targets) == (expected.steps, expected.samples_seen, expected.optimizer_targets)


def test_resume_between_tasks_yields_the_finished_task_again(tmp_path):
    whole = train(tmp_path / "whole")
    model = tiny_model()
    interrupted = Trainer(model, LastLayer(model, settings=SETTINGS), collate, settings=SETTINGS, folder=tmp_path / "cut")
    first = next(interrupted.learn(stream()))
    resumed = train(tmp_path / "cut")
    assert [(learnt.task.name, learnt.is_resumed) for learnt in resumed.learnt] == [("first", True), ("second", False)]
    assert resumed.learnt[0].cost == first.cost
    assert_same_run(resumed, whole, tmp_path / "cut", tmp_path / "whole")


def test_finished_stream_is_not_trained_again(tmp_path):
    train(tmp_path)
    rows = (tmp_path / "losses.jsonl").read_bytes()
    again = train(tmp_path)
    assert [(learnt.task.name, learnt.is_resumed) for learnt in again.learnt] == [("second", True)]
    assert (tmp_path / "losses.jsonl").read_bytes() == rows


def test_checkpoint_is_safetensors_and_json_only(tmp_path):
    train(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["state.json", "tensors.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "losses.jsonl"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_half_written_checkpoint_is_refused_by_name(tmp_path, name):
    train(tmp_path)
    path = tmp_path / "checkpoint" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{name}[\s\S]*Delete the folder .*checkpoint to start this cell anew"):
        train(tmp_path)


def test_missing_half_of_a_checkpoint_is_refused(tmp_path):
    train(tmp_path)
    (tmp_path / "checkpoint" / "tensors.safetensors").unlink()
    with pytest.raises(UserError, match=r"tensors\.safetensors"):
        train(tmp_path)


def test_kill_while_saving_loses_nothing(tmp_path):
    whole = train(tmp_path / "whole")
    folder = tmp_path / "cut"
    train(folder)
    (folder / "checkpoint").rename(folder / "checkpoint.old")  # between the two moves of a save
    (folder / "checkpoint.part").mkdir()
    assert_same_run(train(folder), whole, folder, tmp_path / "whole")


class Filling(LastLayer):
    """Fills the disk after the first checkpoint, which is written before the third step."""

    steps = 0

    def before_step(self, model):
        self.steps += 1
        if self.steps == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


Filling.__name__ = "LastLayer"


def test_full_disk_leaves_the_former_checkpoint_to_go_on_from(tmp_path):
    whole, folder = train(tmp_path / "whole"), tmp_path / "full"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"Cannot write .*What was there before is unchanged"):
            train(folder, method=Filling)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_json(folder / "checkpoint" / "state.json")["place"] == {"task": 0, "stage": 0, "step": 2}
    assert_same_run(train(folder), whole, folder, tmp_path / "whole")


def test_other_recipe_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match=r"learning_rate was 0\.005, is 0\.1"):
        train(tmp_path, settings=SETTINGS.model_copy(update={"learning_rate": 0.1}))


def test_conveniences_may_change_between_runs(tmp_path):
    train(tmp_path)
    train(tmp_path, settings=SETTINGS.model_copy(update={"save_every": 3, "log_every": 5}))


def test_lost_lines_of_losses_are_refused(tmp_path):
    train(tmp_path)
    (tmp_path / "losses.jsonl").write_text("")
    with pytest.raises(UserError, match="has 0 lines"):
        train(tmp_path)


class Interrupted(Exception):
    """The power goes."""


class Fragile:
    """A collator that fails at its n-th call."""

    def __init__(self, collator: Collator, calls: float) -> None:
        self.collator, self.calls = collator, calls

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        self.calls -= 1
        if self.calls < 0:
            raise Interrupted
        return self.collator(samples)


def learn_by(name: str, folder: Path, *, calls: float = math.inf) -> Trainer:
    model, processor = build("llava")
    settings = TrainSettings(steps=4, batch_size=2, save_every=2, learning_rate=1e-2)
    method = METHODS[name](model, settings=settings)
    tasks = tuple(Task(name=task, train=pictures(task, 5), test=[]) for task in ("one", "two"))
    trainer = Trainer(model, method, Fragile(Collator(processor), calls), settings=settings, folder=folder)
    for _ in trainer.learn(Stream(tasks=tasks)):
        pass
    return trainer


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_resumes_to_the_same_weights(tmp_path, name):
    whole = learn_by(name, tmp_path / "whole")
    for calls in (3, 7):  # in the first task; in the second, or (joint, routed) later in the first
        folder = tmp_path / str(calls)
        with pytest.raises(Interrupted):
            learn_by(name, folder, calls=calls)
        resumed = learn_by(name, folder)
        for path, value in weights(whole).items():
            assert torch.equal(weights(resumed)[path], value), path
        for key, value in whole.method.state_dict().items():
            assert torch.equal(resumed.method.state_dict()[key], value), key
        assert (folder / "losses.jsonl").read_bytes() == (tmp_path / "whole" / "losses.jsonl").read_bytes()
