"""How often a prompt goes through the decoder: once, and once more where the prompt itself decides. Counted by hooks on every layer."""

import contextlib

import pytest
import torch

from alula import Collator, Stream, Trainer
from alula.context import Routing
from alula.data.tasks import general_prompts
from alula.methods import METHODS
from alula.mixture import observe
from alula.objectives.next_token import IGNORED
from alula.routers.named import ROUTINGS
from methods_at_work import SETTINGS, tasks
from taught_experts import taught
from zoo import build, example_batch

FIXED = Routing(fixed={"one": 1.0})
PASSES = [("fixed", FIXED, 1), *((name, ROUTINGS[name], 1) for name in ("gate", "arrow", "analytic_token"))]
PASSES += [(name, ROUTINGS[name], 2) for name in ("analytic", "analytic_reject", "gate_combined")]
EVERY = pytest.mark.parametrize(("routing", "passes"), [pytest.param(routing, passes, id=name) for name, routing, passes in PASSES])
NEW_TOKENS = 4


@contextlib.contextmanager
def forwards(model, parts):
    """The number of tokens in each forward of the decoder; every layer is in each of them."""
    seen = {path: [] for path in parts.layers}

    def count(path):
        def hook(module, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            seen[path].append(hidden.shape[1])

        return hook

    hooks = [model.get_submodule(path).register_forward_pre_hook(count(path), with_kwargs=True) for path in parts.layers]
    first = seen[parts.layers[0]]
    try:
        yield first
    finally:
        for hook in hooks:
            hook.remove()
        assert all(tokens == first for tokens in seen.values())


@pytest.fixture(scope="module")
def ready():
    """A model with two experts that every router can choose from, and a batch of prompts."""
    model, processor, mixtures = taught("llava")
    batch = example_batch("llava", processor)
    for name, text_only in (("one", False), ("two", True)):
        observe(mixtures, name, example_batch("llava", processor, text_only=text_only), tokens=True)
    mixtures.freeze()
    return model, mixtures, batch


@EVERY
def test_a_generated_answer_costs_one_pass_per_token_and_one_more_over_the_prompt_where_it_decides(ready, routing, passes):
    model, mixtures, batch = ready
    with mixtures.using(routing), forwards(model, mixtures.anatomy) as seen:
        model.generate(**batch, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert seen == [batch["input_ids"].shape[1]] * passes + [1] * (NEW_TOKENS - 1)


@EVERY
def test_a_step_of_training_is_one_forward_and_one_more_over_the_prompt_where_it_decides(ready, routing, passes):
    model, mixtures, batch = ready
    labels = batch["input_ids"].clone()
    labels[:, :-2] = IGNORED
    mixtures.train_expert("one")
    with mixtures.using(routing), forwards(model, mixtures.anatomy) as seen:
        model(**batch, labels=labels).loss.backward()
    mixtures.freeze()
    assert seen == [batch["input_ids"].shape[1]] * passes


def test_a_decision_that_is_held_costs_its_pass_once_for_many_forwards(ready):
    model, mixtures, batch = ready
    with (
        torch.no_grad(),
        mixtures.using(ROUTINGS["analytic"]),
        forwards(model, mixtures.anatomy) as seen,
        mixtures.director.on_prompts(batch),
    ):
        for _ in range(3):
            model(**batch)
    assert len(seen) == 1 + 3


def test_each_stage_of_routed_goes_through_the_model_once_per_step_and_general_takes_all_300_prompts(monkeypatch):
    monkeypatch.setattr("alula.methods.routed.general_prompts", general_prompts)  # not the few that `conftest.py` leaves
    model, processor = build("llava")
    method = METHODS["routed"](model, settings=SETTINGS, rank=2, arms=("analytic", "gate", "arrow"), gate_steps=3, statistics_samples=5)
    trainer = Trainer(model, method, Collator(processor), settings=SETTINGS, folder=None)
    ends, end = {}, method.end_stage
    with forwards(model, method.mixtures.anatomy) as seen:

        def noted(model, task, stage):
            ends[stage.name] = (len(seen) - sum(passes for passes, _ in ends.values()), stage.steps)
            end(model, task, stage)

        method.end_stage = noted
        list(trainer.learn(Stream(tasks=tasks("one"))))
    assert ends.keys() == {"expert", "gate", "statistics", "general"}
    assert all(passes == steps for passes, steps in ends.values()), ends
    assert ends["general"][1] == -(-300 // SETTINGS.batch_size)
