"""Forgetting, for real and by the book: naive tuning of a tiny LLaVA on three tasks forgets and isolated experts do not; the
numbers of transfer and forgetting are those of mammoth on any matrix.
"""

import numpy as np
import pytest
from PIL import Image

from alula import Collator, ScoreMatrix, Stream, Task, Trainer, TrainSettings
from alula.data.sample import Sample
from alula.evaluation.evaluate import evaluate_task
from alula.evaluation.scores import score_task
from alula.methods import METHODS
from zoo import build

NAMES, COLOURS = ("first", "second", "third"), ("red", "green", "blue")
SETTINGS = TrainSettings(steps=8, batch_size=3, learning_rate=5e-3)


def task(number):
    """Pictures that have another colour in each task; the question says which task it is."""
    samples = [
        Sample.ask(
            f"{NAMES[number]}: what colour is the {shape}?",
            COLOURS[number],
            images=(Image.new("RGB", (28, 28), COLOURS[number]),),
            options=COLOURS,
            id=shape,
        )
        for shape in ("square", "circle", "star")
    ]
    return Task(name=NAMES[number], train=samples, test=samples, scoring="ranked")


STREAM = Stream(tasks=tuple(task(number) for number in range(3)))


def matrix_of(name, **options):
    """The score matrix of a method, every score measured; an isolated expert is asked as the oracle asks it."""
    model, processor = build("llava")
    collator = Collator(processor)
    method = METHODS[name](model, settings=SETTINGS, rank=4, **options)
    trainer = Trainer(model, method, collator, settings=SETTINGS, folder=None)

    def row(arm):
        found = []
        for each in STREAM.tasks:
            with arm.enter(each):
                found.append(score_task(each, evaluate_task(model, collator, each, batch_size=9, around=arm.around)).score)
        return found

    rows = [row(method.arms()[0])]
    rows += [row(method.arms()[0]) for _ in trainer.learn(STREAM)]
    return ScoreMatrix(tasks=NAMES, rows=np.array(rows), counts=np.full(3, 3))


@pytest.fixture(scope="module")
def matrices():
    return {"naive": matrix_of("finetune"), "isolated": matrix_of("routed", arms=("oracle",))}


def test_naive_tuning_learns_each_task_and_forgets_it(matrices):
    naive = matrices["naive"]
    assert naive.rows[0].mean() < 0.5 and naive.learning_accuracy > 0.9
    assert naive.forgetting > 0.8, "more than 80 points"


def test_isolated_experts_learn_as_much_and_forget_exactly_nothing(matrices):
    isolated = matrices["isolated"]
    assert isolated.rows[0].mean() < 0.5 and isolated.learning_accuracy > 0.9
    assert isolated.forgetting == 0.0 and isolated.backward_transfer == 0.0
    for column in range(3):
        assert len(set(isolated.rows[column + 1 :, column])) == 1


# What mammoth's utils/metrics.py (aimagelab/mammoth) defines, over `results`: a row for each task learnt, with the scores on the tasks
# seen so far (or on all); and over the scores of a model that learnt nothing.


def mammoth_backward_transfer(results):
    return np.mean([results[-1][task] - results[task][task] for task in range(len(results) - 1)])


def mammoth_forward_transfer(results, untrained):
    return np.mean([results[task - 1][task] - untrained[task] for task in range(1, len(results))])


def mammoth_forgetting(results):
    """A task that a row does not know counts as 0 there; the best of all rows, the last one too, minus the last."""
    padded = np.zeros((len(results), len(results)))
    for number, row in enumerate(results):
        padded[number, : len(row)] = row
    return np.mean((padded.max(axis=0) - padded[-1])[:-1])


def random_matrix(seed):
    generator = np.random.default_rng(seed)
    count = int(generator.integers(2, 9))
    return ScoreMatrix(
        tasks=tuple(f"task {number}" for number in range(count)), rows=generator.random((count + 1, count)), counts=np.full(count, 50)
    )


@pytest.mark.parametrize("seed", range(25))
def test_transfer_and_forgetting_are_mammoths_on_any_matrix(seed):
    found = random_matrix(seed)
    results = found.rows[1:].tolist()
    seen = [row[: number + 1] for number, row in enumerate(results)]
    assert found.backward_transfer == pytest.approx(mammoth_backward_transfer(results), abs=1e-12)
    assert found.forward_transfer == pytest.approx(mammoth_forward_transfer(results, found.rows[0]), abs=1e-12)
    assert found.value("forgetting_with_last_row") == pytest.approx(mammoth_forgetting(seen), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_forgetting_of_chaudhry_is_mammoths_where_the_last_row_is_never_the_best(seed):
    found = random_matrix(seed)
    found.rows[-1] *= found.rows[1:].min() / 2
    assert found.forgetting == pytest.approx(mammoth_forgetting([row[: number + 1] for number, row in enumerate(found.rows[1:].tolist())]))


def test_scores_on_tasks_to_come_change_no_measure_of_forgetting():
    found = random_matrix(3)
    future = np.triu(np.ones(found.rows[1:].shape, dtype=bool), 1)
    hidden = ScoreMatrix(tasks=found.tasks, rows=np.where(np.vstack([future[:1] & False, future]), 1.0, found.rows), counts=found.counts)
    assert hidden.forgetting == found.forgetting
    assert hidden.value("forgetting_with_last_row") == found.value("forgetting_with_last_row")


def test_the_numbers_of_the_three_tasks_are_mammoths_too(matrices):
    for found in matrices.values():
        seen = [row[: number + 1] for number, row in enumerate(found.rows[1:].tolist())]
        assert found.backward_transfer == pytest.approx(mammoth_backward_transfer(seen))
        assert found.value("forgetting_with_last_row") == pytest.approx(mammoth_forgetting(seen))
