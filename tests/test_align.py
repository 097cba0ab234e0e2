"""The shipped connector: what its manifest says is what the recipe gives."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import alula.aligning
from alula.data.stream import Task
from alula.data.tasks import load_task
from alula.data.tasks.captions import draw, sprites
from alula.files import read_jsonl, read_tensors, sha256
from alula.methods.align import Align
from alula.training import TrainSettings

ASSETS = Path(alula.__file__).parent / "models" / "assets"


def manifest():
    return json.loads((ASSETS / "smol_connector.json").read_text())


def test_the_shipped_connector_is_the_one_of_its_manifest():
    assert sha256(ASSETS / "smol_connector.safetensors") == manifest()["sha256"]
    assert sum(tensor.numel() for tensor in read_tensors(ASSETS / "smol_connector.safetensors").values()) == 1_072_768


class StoppedError(Exception):
    pass


class Drawn(Sequence):
    """The recipe's samples, drawn only when a step asks for one: all of them take as long as many steps."""

    def __init__(self, count):
        self.count, self.rows = count, sprites("train")

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return draw(self.rows, "train", index, seed=0)


def test_a_sample_is_the_same_however_many_there_are():
    drawn = Drawn(9)
    assert load_task("captions", train_size=3, test_size=0).train == [drawn[index] for index in range(3)]


@pytest.mark.smol
@pytest.mark.slow
def test_the_first_steps_of_the_recipe_give_the_losses_of_the_manifest(tmp_path, monkeypatch):
    made = manifest()

    class Short(Align):
        steps = 0

        def loss(self, model, batch):
            self.steps += 1
            if self.steps == 3:
                raise StoppedError
            return super().loss(model, batch)

    monkeypatch.setattr(alula.aligning, "Align", Short)
    task = Task(name=made["task"], train=Drawn(made["train_samples"]), test=[])
    with pytest.raises(StoppedError):
        alula.aligning.align("smol", task, settings=TrainSettings(**made["settings"]), folder=tmp_path)
    losses = [row["loss"] for row in read_jsonl(tmp_path / "losses.jsonl")]
    # other numbers of threads add in another order
    assert losses == pytest.approx(made["first_losses"][: len(losses)], rel=1e-3) and len(losses) == 2
