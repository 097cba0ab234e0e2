"""`mixtures.experts()`: what is on a model and what it does, and that a second expert leaves the first one's logits as they were."""

import pytest
import torch

from alula.context import OFF, Routing
from alula.mixture import ExpertState
from taught_experts import logits, taught
from zoo import example_batch


def states(mixtures, what):
    return {row.name: getattr(row, what) for row in mixtures.experts()}


def test_the_table_has_a_row_for_each_expert_in_order_of_arrival():
    _, _, mixtures = taught("llava", experts=("one",))
    mixtures.grow("two", rank=5)
    mixtures.freeze()
    rows = mixtures.experts()
    assert [(row.name, row.rank, row.trainable, row.merged) for row in rows] == [("one", 2, False, None), ("two", 5, False, None)]
    mixtures.remove("one")
    assert list(states(mixtures, "rank").items()) == [("two", 5)]


@pytest.mark.parametrize(
    ("routing", "speaking"),
    [
        (OFF, ()),
        (Routing(fixed={"two": 1.0}), ("two",)),
        (Routing(fixed={"one": 0.0, "two": 0.5}), ("two",)),
        (Routing(gate_of="one"), ("one",)),
        (Routing(router="gate", level="token"), ("one", "two")),
    ],
)
def test_active_is_who_may_speak_in_the_next_forward(routing, speaking):
    model, processor, mixtures = taught("llava")
    mixtures.routing = Routing(fixed={"one": 1.0})
    with mixtures.using(routing):
        assert tuple(name for name, active in states(mixtures, "active").items() if active) == speaking
        seen = set()

        def note(path, weights, active):
            seen.update(mixtures.names[index] for place, index in enumerate(active) if weights[..., place].any())

        with mixtures.director.recording(recorder=note):
            logits(model, example_batch("llava", processor))
        assert seen == set(speaking)
    assert states(mixtures, "active") == {"one": True, "two": False}


@pytest.mark.parametrize("verb", ["train_expert", "train_gate"])
def test_trainable_is_whose_matrices_or_gates_get_gradients(verb):
    _, _, mixtures = taught("llava")
    mixtures.freeze()
    assert not any(states(mixtures, "trainable").values())
    getattr(mixtures, verb)("two")
    assert states(mixtures, "trainable") == {"one": False, "two": True}


def test_merged_is_the_weight_with_which_an_expert_went_into_the_models_own():
    _, _, mixtures = taught("llava")
    mixtures.routing = Routing(fixed={"one": 1.0})
    mixtures.train_expert("one")
    mixtures.merge({"one": 0.5})
    assert mixtures.experts() == tuple(
        ExpertState(name=name, rank=2, active=False, trainable=False, merged=merged) for name, merged in (("one", 0.5), ("two", None))
    )
    assert mixtures.names == []


def test_after_detach_there_are_no_rows():
    _, _, mixtures = taught("llava")
    mixtures.detach()
    assert mixtures.experts() == ()


def test_a_second_expert_leaves_the_firsts_logits_bit_identical_while_it_trains():
    model, processor, mixtures = taught("llava", experts=("one",))
    batch = example_batch("llava", processor)
    mixtures.freeze()
    first = Routing(fixed={"one": 1.0})
    with mixtures.using(first):
        before = logits(model, batch)
    mixtures.grow("two", rank=2)
    mixtures.train_expert("two")
    mixtures.routing = Routing(fixed={"two": 1.0})
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    silent = logits(model, batch)
    for _ in range(2):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    assert not torch.equal(logits(model, batch), silent), "the second expert learnt nothing"
    mixtures.freeze()
    with mixtures.using(first):
        assert torch.equal(logits(model, batch), before)
