"""Losses and scores reach the trackers that Accelerate knows."""

import contextlib
import json
import sqlite3
import time

import pytest

from alula.errors import UserError
from alula.training import Trainer
from resume_worker import collate, stream, tiny_model
from test_training import FAST, Everything, learn


def learn_with_scores(folder, tracker):
    model = tiny_model()
    trainer = Trainer(model, Everything(model, settings=FAST), collate, settings=FAST, folder=folder, trackers=[tracker])
    trainer.track({"score/untouched": 0.25})
    for learnt in trainer.learn(stream()):
        trainer.track({f"score/{learnt.task.name}": 0.5})


def test_tensorboard_gets_losses_and_scores(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    learn_with_scores(tmp_path / "cell", "tensorboard")
    kept = min((tmp_path / "cell").rglob("events.out.*"), key=lambda path: len(path.parts))  # settings are in a folder below
    found = accumulator.EventAccumulator(str(kept.parent))
    found.Reload()
    steps = {tag: [event.step for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert steps["loss"] == [1, 2, 3, 4, 5, 6]
    assert [steps[f"score/{name}"] for name in ("untouched", "first", "second")] == [[0], [3], [6]]


# wandb's own: a field of pydantic under a name it reserves, and the like.
@pytest.mark.filterwarnings("ignore::Warning")
def test_wandb_gets_losses_and_scores_in_the_cells_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    learn_with_scores(tmp_path / "cell", "wandb")
    (kept,) = (tmp_path / "cell" / "wandb").glob("offline-run-*/*.wandb")
    until = time.monotonic() + 30
    while b"score/second" not in kept.read_bytes() and time.monotonic() < until:
        time.sleep(0.2)  # its service writes the file a moment after the run was closed
    assert b"loss" in kept.read_bytes() and b"score/second" in kept.read_bytes() and not (tmp_path / "wandb").exists()


def test_trackio_gets_losses_and_scores(tmp_path, monkeypatch, capsys):
    trackio = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(trackio, "TRACKIO_DIR", tmp_path)  # read from the environment when it is imported
    learn_with_scores(tmp_path / "cell", "trackio")
    (found,) = tmp_path.glob("*.db")
    with contextlib.closing(sqlite3.connect(found)) as opened:
        rows = [(step, json.loads(values)) for step, values in opened.execute("SELECT step, metrics FROM metrics")]
    assert [step for step, values in rows if "loss" in values] == [1, 2, 3, 4, 5, 6]
    assert [(step, values) for step, values in rows if "loss" not in values] == [
        (0, {"score/untouched": 0.25}), (3, {"score/first": 0.5}), (6, {"score/second": 0.5})
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "words"), [("tensorbord", "Did you mean 'tensorboard'"), ("comet_ml", "not installed here")])
def test_missing_tracker_is_refused(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        learn(Everything, folder=tmp_path, trackers=[name])
