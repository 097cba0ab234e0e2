"""The learning-rate rule of MM1: the published table, what counts as the backbone, and that training goes by it."""

import logging

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from alula.config import check_train
from alula.data.stream import Stream, Task
from alula.errors import UserError
from alula.experts.upcycling import upcycle
from alula.files import read_jsonl
from alula.methods import METHODS
from alula.methods.rates import backbone_size, mm1_rate, resolve_rate
from alula.mixture import attach
from alula.training import Trainer, TrainSettings
from resume_worker import collate, samples
from zoo import build

TABLE = {9e6: "6.75e-04", 85e6: "2.62e-04", 302e6: "1.54e-04", 1.2e9: "8.58e-05", 3e9: "5.83e-05", 7e9: "4.08e-05", 30e9: "2.21e-05"}


def tiny(**fields):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, **fields))


def test_the_rule_gives_the_published_table():
    assert {size: f"{mm1_rate(int(size)):.2e}" for size in TABLE} == TABLE


def test_the_backbone_is_counted_without_embeddings_head_encoder_experts_and_copies():
    # Two layers of q, k, v, o (4 x 16 x 16), gate, up, down (3 x 16 x 32), two norms; one norm at the end.
    expected = 2 * (4 * 256 + 3 * 512 + 2 * 16) + 16
    for ties in (True, False):
        model = tiny(tie_word_embeddings=ties)
        assert backbone_size(model) == expected
    attach(model).grow("one")
    assert backbone_size(model) == expected
    sparse = tiny()
    upcycle(sparse, experts=4, every=1)
    assert backbone_size(sparse) == expected
    seeing = build("llava")[0]
    assert backbone_size(seeing) == sum(p.numel() for n, p in seeing.model.language_model.named_parameters() if "embed" not in n)


def test_training_goes_by_the_rule_and_says_which_size_it_used(caplog, tmp_path):
    settings = check_train({"learning_rate": "mm1", "steps": 1, "schedule": "constant", "warmup_ratio": 0})
    model = tiny()
    method = METHODS["finetune_full"](model, settings=settings)
    assert method.stages(Task(name="t", train=(), test=()))[0].learning_rate == mm1_rate(backbone_size(model))
    with caplog.at_level(logging.INFO):
        trainer = Trainer(model, method, collate, settings=settings, folder=tmp_path)
        list(trainer.learn(Stream(tasks=(Task(name="t", train=samples("t", 4), test=[]),))))
    assert read_jsonl(tmp_path / "losses.jsonl")[0]["learning_rate"] == mm1_rate(backbone_size(model))
    assert f"N = {backbone_size(model):,}" in caplog.text
    # A step takes 0.1 * rate off each weight, which is torch's weight_decay times the rate.
    assert trainer.settings.weight_decay == 0.1


def test_numbers_stay_numbers_and_other_words_are_refused():
    settings = TrainSettings(learning_rate=1e-3)
    assert resolve_rate(settings, tiny()) is settings
    assert check_train({"learning_rate": "1e-3"}).rate == 1e-3
    for wrong in (0, -1.0, "mm2"):
        with pytest.raises(UserError, match="learning_rate"):
            check_train({"learning_rate": wrong})
