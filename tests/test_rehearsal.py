"""Rehearsal of real samples and replay of written ones: what is learnt again, how much of it, and from which seed."""

import math

import pytest
import torch

from alula import Collator
from alula.data.sample import Sample
from alula.data.stream import Stream, Task
from alula.methods import METHODS, compose
from resume_worker import SETTINGS, pictures, samples, stream
from test_resume import Fragile, Interrupted
from tiny_methods import learn, tiny
from zoo import build


def long_stream():
    base = Task(name="base", train=samples("base", 50), test=[], is_base=True)
    return Stream(tasks=tuple(Task(name=name, train=samples(name, size), test=[]) for name, size in LONG.items()), base_tasks=(base,))


LONG = {"a": 200, "b": 300, "c": 100}


def mixed(options, *, name="c", seed=0):
    """The ids of what is learnt with a task besides its own samples."""
    model, method = tiny("finetune", ("rehearsal", options), settings=SETTINGS.model_copy(update={"seed": seed}))
    tasks = method.arrange(long_stream()).tasks
    task = next(task for task in tasks if task.name == name)
    method.begin_task(model, task)
    for stage in method.stages(task):
        method.begin_stage(model, task, stage)
    data = method.training_data(task)
    assert list(data[: len(task.train)]) == list(task.train)
    return [sample.id for sample in data[len(task.train) :]]


def of(ids, name):
    return [found for found in ids if found.startswith(f"{name} ")]


def test_one_percent_of_each_earlier_task_is_rehearsed_and_no_base_task():
    assert mixed({}, name="a") == []
    assert [len(of(mixed({}, name="b"), name)) for name in ("a", "b", "base")] == [2, 0, 0]
    found = mixed({})
    assert [len(of(found, name)) for name in ("a", "b", "c", "base")] == [2, 3, 0, 0]
    assert len(set(found)) == 5


def test_what_is_rehearsed_follows_from_the_seed_and_stays_in_memory():
    options = {"ratio": 0.05}
    assert mixed(options) == mixed(options)
    assert mixed(options) != mixed(options, seed=1)
    assert of(mixed(options), "a") == mixed(options, name="b")


@pytest.mark.parametrize("policy", ["per_task", "reservoir"])
def test_the_memory_has_the_size_it_was_given(policy):
    options = {"memory_size": 31, "policy": policy}
    assert len(set(mixed(options, name="b"))) == len(set(mixed(options))) == 31


def test_per_task_memory_is_shared_equally_and_only_shrinks():
    found = mixed({"memory_size": 31})
    assert [len(of(found, name)) for name in ("a", "b")] == [16, 15]
    assert set(of(found, "a")) < set(mixed({"memory_size": 31}, name="b"))


def test_a_reservoir_holds_every_sample_with_equal_probability():
    counts = [len(of(mixed({"memory_size": 100, "policy": "reservoir"}, seed=seed), "a")) for seed in range(20)]
    assert sum(counts) / 20 == pytest.approx(40, abs=4)  # 200 of 500; the mean's standard deviation is 1


def test_a_stage_for_images_rehearses_only_images():
    model, processor = build("llava")
    method = METHODS["wings"](model, settings=SETTINGS, rank=2)
    method = compose(model, method, [("rehearsal", {"ratio": 1.0})], collator=Collator(processor))
    both = Task(name="both", train=[*pictures("both", 3), *samples("both", 2)], test=[])
    tasks = method.arrange(Stream(tasks=(both, Task(name="now", train=pictures("now", 4), test=[])))).tasks
    sizes = []
    for stage in method.stages(tasks[1]):
        method.begin_stage(model, tasks[1], stage)
        sizes.append(len(method.training_data(tasks[1])))
    assert sizes == [4 + 3, 4 + 5]


def test_statistics_are_of_the_task_alone():
    model, method = tiny("routed", ("rehearsal", {"ratio": 1.0}), statistics_samples=4)
    task = method.arrange(stream()).tasks[1]
    method.begin_task(model, task)
    sizes = {}
    for stage in method.stages(task):
        method.begin_stage(model, task, stage)
        sizes[stage.name] = len(method.training_data(task))
    assert (sizes["expert"], sizes["statistics"]) == (22, 11)


def test_text_samples_are_rehearsed_too():
    earlier = Task(name="text", train=[Sample.ask("Capital of Kenya?", "Nairobi")], test=[])
    _, method = tiny("finetune", ("rehearsal", {"ratio": 1.0}))
    tasks = method.arrange(Stream(tasks=(earlier, Task(name="now", train=pictures("now", 2), test=[])))).tasks
    assert method.training_data(tasks[1])[2:] == [earlier.train[0]]


def talkative():
    """A tiny model that soon comes to an end: every fifth token ends an answer."""
    model, processor = build("llava")
    model.generation_config.eos_token_id = list(range(2, 512, 5))
    method = METHODS["finetune"](model, settings=SETTINGS, rank=2)
    return model, compose(model, method, [("generative_replay", {"num_samples": 6, "max_new_tokens": 24})], collator=Collator(processor))


def test_the_base_model_writes_what_is_replayed_and_keeps_it():
    replays = []
    for change in (0.0, 1.0):
        model, method = talkative()
        with torch.no_grad():
            for mixture in method.mixtures.sites.values():
                mixture.experts.B[0] += change  # an expert must have no say in it
        task = Task(name="one", train=pictures("one", 3), test=[])
        method.begin_stage(model, task, method.stages(task)[0])
        replays.append(method.training_data(task)[3:])
        assert method.training_data(task)[3:] == replays[-1]
    assert replays[0] == replays[1] and len(replays[0]) == 6
    assert all(sample.question and sample.answer and not sample.images for sample in replays[0])
    _, other = talkative()
    other.load_state_dict(method.state_dict())
    assert other.additions["generative_replay"].samples == replays[0]


def test_replayed_samples_can_be_trained_on():
    model, method = talkative()
    tasks = Stream(tasks=(Task(name="one", train=pictures("one", 2), test=[]),))
    (learnt,) = learn(model, method, tasks, collator=method.additions["generative_replay"].collator)
    assert learnt.cost.samples_seen == SETTINGS.steps * SETTINGS.batch_size


def test_a_run_cut_in_its_second_task_replays_the_same_samples(tmp_path):
    tasks = Stream(tasks=tuple(Task(name=name, train=pictures(name, 3), test=[]) for name in ("one", "two")))

    def run(folder, calls=math.inf):
        model, method = talkative()
        learn(model, method, tasks, folder=folder, collator=Fragile(method.additions["generative_replay"].collator, calls))
        return model.state_dict(), method.additions["generative_replay"].samples

    with pytest.raises(Interrupted):
        run(tmp_path / "cut", calls=17)
    (whole, replayed), (resumed, again) = run(tmp_path / "whole"), run(tmp_path / "cut")
    assert replayed == again
    assert all(torch.equal(resumed[path], value) for path, value in whole.items())
    assert (tmp_path / "cut/losses.jsonl").read_bytes() == (tmp_path / "whole/losses.jsonl").read_bytes()
