"""A base model in four bits (bitsandbytes): experts learn beside it, and it stays what it is."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from alula.data.collate import Collator
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.methods import METHODS
from alula.models import load_model
from alula.training import Trainer, TrainSettings
from resume_worker import pictures
from zoo import build, example_batch

# bitsandbytes' own: it asks for half precision as input and converts float32 itself.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def saved(tmp_path):
    model, processor = build("llava")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def test_experts_learn_on_a_base_of_four_bits_which_stays_bit_identical(saved):
    model, processor = load_model(saved, dtype="4bit")
    batch = example_batch("llava", processor)
    with torch.no_grad():
        plain = model(**batch).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = TrainSettings(steps=4, batch_size=3, learning_rate=2e-2, schedule="constant")
    method = METHODS["routed"](model, settings=settings, rank=2, layers=[1, 2])
    hosts = [mixture.host for mixture in method.mixtures.sites.values()]
    assert hosts and all(isinstance(host, Linear4bit) and host.weight.dtype == torch.uint8 for host in hosts)
    trainer = Trainer(model, method, Collator(processor), settings=settings, folder=saved / "run")
    losses = []
    trainer.log.append = lambda row: losses.append(row["loss"])
    list(trainer.learn(Stream(tasks=(Task(name="colours", train=pictures("colours", 3), test=[]),))))
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad(), method.base_model(model):
        assert torch.equal(model(**batch).logits, plain)
    method.mixtures.detach()
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())


def test_a_base_of_four_bits_cannot_be_merged_into(saved):
    model, _ = load_model(saved, dtype="4bit")
    with pytest.raises(UserError, match="Linear4bit; only plain linear layers can be merged"):
        METHODS["lora"](model, settings=TrainSettings())


def test_four_bits_without_bitsandbytes_says_what_to_install(saved, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[quantization\]'"):
        load_model(saved, dtype="4bit")
