"""Every addition on every method: two tasks are learnt, or a sentence refuses the pair before anything is."""

import copy
from functools import cache

import pytest

from alula import Collator, Stream, Task, Trainer, TrainSettings
from alula.errors import UserError
from alula.experts.upcycling import upcycle
from alula.methods import ADDITIONS, METHODS, compose
from resume_worker import pictures
from zoo import build

SETTINGS = TrainSettings(steps=1, batch_size=2, learning_rate=1e-3)
TASKS = tuple(Task(name=name, train=pictures(name, 2), test=[]) for name in ("one", "two"))
SMALL = {"layers": [1], "rank": 2}
METHOD_OPTIONS = {
    "finetune": SMALL,
    "joint": SMALL,
    "routed": {**SMALL, "arms": ("oracle",)},
    "specialist": SMALL,
    "wings": {"rank": 2, "connector": False, "visual_ratio": 0.0},
}
ADDITION_OPTIONS = {
    "distillation": {"teacher": "previous"},
    "ewc": {"num_samples": 1},
    "freezing": {"part": "model.language_model.layers.3"},
    "generative_replay": {"num_samples": 1, "max_new_tokens": 16},
    "rehearsal": {"ratio": 0.5},
}
# What the sentence says of the pairs that are refused. Every other pair runs.
REFUSED = {("ewc", name): "parameters of its own" for name in ("lora", "merging", "routed", "specialist")}
REFUSED |= {("o_lora", name): "no LoRA expert per task" for name in METHODS.names() if name not in ("routed", "specialist")}


@cache
def model_for(addition):
    """Sparse where the addition wants sparse networks, talkative where it wants answers that end."""
    model, processor = build("llava")
    if addition == "generative_replay":
        model.generation_config.eos_token_id = list(range(2, 512, 5))
    if addition == "balance":
        upcycle(model, experts=2)
    return model, Collator(processor)


@pytest.mark.parametrize("method", METHODS.names())
@pytest.mark.parametrize("addition", ADDITIONS.names())
def test_a_pair_learns_two_tasks_or_is_refused_at_the_start(addition, method):
    untouched, collator = model_for(addition)
    model = copy.deepcopy(untouched)
    inner = METHODS[method](model, settings=SETTINGS, **METHOD_OPTIONS.get(method, {}))
    additions = [(addition, ADDITION_OPTIONS.get(addition, {}))]
    if (addition, method) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[addition, method]):
            compose(model, inner, additions, collator=collator)
        return
    trainer = Trainer(model, compose(model, inner, additions, collator=collator), collator, settings=SETTINGS, folder=None)
    learnt = list(trainer.learn(Stream(tasks=TASKS)))
    assert sum(one.cost.steps for one in learnt) >= 2


@pytest.mark.parametrize("method", METHODS.names())
def test_balance_is_refused_where_nothing_is_sparse(method):
    model, processor = build("llava")
    inner = METHODS[method](model, settings=SETTINGS, **METHOD_OPTIONS.get(method, {}))
    with pytest.raises(UserError, match="no sparse feed-forward networks"):
        compose(model, inner, [("balance", {})], collator=Collator(processor))
