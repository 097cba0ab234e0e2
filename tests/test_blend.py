"""Claims about blends: ratios hold everywhere, nothing comes twice unasked, and a resumed run sees what an unbroken one sees."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from alula.config import check_recipe, read_recipe, write_recipe
from alula.data import Blend, Sample, Source, Stream, Task
from alula.data.choices import TaskChoice, read_choice
from alula.errors import UserError
from alula.running.choices import load_choice
from alula.training import Trainer
from data_files import qa, written
from resume_worker import SETTINGS, LastLayer, collate, samples, tiny_model


def source(name: str, size: int, **fields: float | int) -> Source:
    return Source(name=name, samples=[Sample.ask(f"{name} {i}", name) for i in range(size)], **fields)


def drawn(blend: Blend) -> Counter[str]:
    return Counter(sample.answer for sample in blend)


def test_ratios_need_not_sum_to_one_and_hold_in_every_beginning() -> None:
    blend = Blend([source("a", 100, ratio=3), source("b", 100, ratio=1), source("c", 100, ratio=6)])
    assert drawn(blend) == {"c": 100, "a": 50, "b": 17} or drawn(blend) == {"c": 99, "a": 50, "b": 17}
    for end in range(10, len(blend)):
        found = Counter(sample.answer for sample in blend[:end])
        for name, share in (("a", 0.3), ("b", 0.1), ("c", 0.6)):
            assert abs(found[name] - share * end) < 1.5
    assert drawn(Blend([source("a", 100, ratio=0.3), source("b", 100, ratio=0.1), source("c", 100, ratio=0.6)])) == drawn(blend)


def test_a_blend_ends_before_a_source_is_needed_more_often_than_its_epochs() -> None:
    few, many = source("few", 5, ratio=1, epochs=2), source("many", 100, ratio=1)
    blend = Blend([few, many])
    assert drawn(blend) == {"few": 10, "many": 10}
    questions = Counter(sample.question for sample in blend)
    assert {questions[f"few {i}"] for i in range(5)} == {2}
    assert max(questions[f"many {i}"] for i in range(100)) == 1
    order = [sample.question for sample in blend if sample.answer == "few"]
    assert order[:5] != order[5:] and sorted(order[:5]) == sorted(order[5:])  # each pass in an order of its own
    assert drawn(Blend([source("few", 10, ratio=1, epochs=0.5), many])) == {"few": 5, "many": 5}


def test_without_ratios_every_sample_comes_once() -> None:
    blend = Blend([source("a", 7), source("b", 30)])
    assert len({sample.question for sample in blend}) == len(blend) == 37


def test_a_cap_keeps_the_same_samples_in_every_pass() -> None:
    blend = Blend([source("a", 50, ratio=1, cap=4, epochs=3), source("b", 50, ratio=1)])
    capped = Counter(sample.question for sample in blend if sample.answer == "a")
    assert len(capped) == 4 and set(capped.values()) == {3}
    other = {sample.question for sample in Blend(blend.sources, seed=1) if sample.answer == "a"}
    assert len(other) == 4 and other != set(capped)


def test_temperature_makes_shares_more_even() -> None:
    sources = [source("a", 100), source("b", 10_000)]
    assert Blend(sources).shares == pytest.approx([1 / 101, 100 / 101])
    assert Blend(sources, temperature=2).shares == pytest.approx([1 / 11, 10 / 11])
    assert Blend(sources, temperature=1e9).shares == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("ratios", [(1, 3), (0.1, 0.3), (1e-300, 3e-300), (1e300, 3e300)])
def test_a_tiny_temperature_leaves_the_largest_source_alone(ratios: tuple[float, float]) -> None:
    few, many = source("few", 5, ratio=ratios[0]), source("many", 6, ratio=ratios[1])
    assert drawn(Blend([few, many])) == {"few": 2, "many": 6}
    inner = Blend([few, many], temperature=0.001)
    assert drawn(inner) == {"many": 6}
    assert drawn(Blend([Source(name="inner", samples=inner, ratio=1), source("other", 3, ratio=1)])) == {"many": 3, "other": 3}


def test_a_source_reached_twice_is_sampled_once_and_its_ratios_are_added() -> None:
    flat = Blend([source("a", 10, ratio=1), source("b", 40, ratio=2), source("a", 10, ratio=1)])
    assert drawn(flat) == {"a": 10, "b": 10}
    assert len({sample.question for sample in flat}) == 20
    inner = Blend([source("a", 10, ratio=1), source("b", 40, ratio=1)])
    nested = Blend([Source(name="inner", samples=inner, ratio=2), source("a", 10, ratio=1)])
    assert [leaf.name for leaf in nested.sources] == ["a", "b"]
    assert nested.shares == pytest.approx([2 / 3, 1 / 3])
    assert len({sample.question for sample in nested}) == len(nested) == 15


def test_the_same_sources_and_seed_give_the_same_samples_at_every_place() -> None:
    sources = [source("a", 20, ratio=2, epochs=2), source("b", 30, ratio=1)]
    first, again = Blend(sources), Blend(sources)
    assert [sample.id for sample in first] == [sample.id for sample in again]
    assert [sample.id for sample in first] != [sample.id for sample in Blend(sources, seed=1)]
    assert [first[place].id for place in (5, -1)] == [[sample.id for sample in first][place] for place in (5, -1)]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Blend([]), "0 sources"),
        (lambda: Blend([source("a", 1)], temperature=0), "temperature 0"),
        (lambda: source("a", 0), "Source 'a' has no samples to learn from"),
        (lambda: Blend([source("a", 1)], temperature=math.nan), "temperature nan"),
        (lambda: source("a", 1, ratio=0), "Source 'a': ratio is 0. A number above 0"),
        (lambda: source("a", 1, ratio=math.inf), "Source 'a': ratio is inf"),
        (lambda: source("a", 1, ratio=math.nan), "Source 'a': ratio is nan"),
        (lambda: source("a", 1, epochs=math.inf), "Source 'a': epochs is inf"),
        (lambda: Blend([source("a", 1, ratio=1), source("b", 1)]), "Source 'b' has no ratio, but others have"),
        (lambda: Blend([source("a", 9, cap=1), source("a", 9)]), "comes twice, with cap 1 and epochs 1.0, then cap None"),
        (lambda: Blend([source("a", 1, ratio=1, epochs=0.5), source("b", 9, ratio=1)]), "empty: source 'a' has too few"),
        (lambda: Blend([Source(name="x", samples=Blend([source("a", 1)]), cap=1)]), "'x' is a blend, and has a cap"),
    ],
)
def test_a_blend_that_cannot_be_is_refused(make, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make()


class Cut(Exception):
    """The process ends here."""


def learn(folder: Path, *, seen: list[str], calls: int | None = None) -> None:
    """Trains on a blend; notes every sample, and ends after so many batches."""
    parts = [Source(name=name, samples=samples(name, size), ratio=ratio) for name, size, ratio in (("old", 30, 1), ("new", 9, 2))]
    model = tiny_model()

    def noted(batch: list[Sample]) -> dict:
        if calls is not None and len(seen) >= calls:
            raise Cut
        seen.append(" ".join(sample.id for sample in batch))
        return collate(batch)

    task = Task(name="blended", train=Blend(parts), test=[])
    trainer = Trainer(model, LastLayer(model, settings=SETTINGS), noted, settings=SETTINGS, folder=folder)
    list(trainer.learn(Stream(tasks=(task,))))


def test_a_resumed_run_sees_the_samples_and_losses_of_an_unbroken_one(tmp_path: Path) -> None:
    whole, before, after = list[str](), list[str](), list[str]()
    learn(tmp_path / "whole", seen=whole)
    with pytest.raises(Cut):
        learn(tmp_path / "cut", seen=before, calls=9)
    learn(tmp_path / "cut", seen=after)
    assert before == whole[:9]
    assert after == whole[-len(after) :] and len(after) < len(whole)

    def losses(name: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / name / "losses.jsonl").read_text().splitlines()]

    assert losses("cut") == losses("whole")


def choice(**fields: object) -> TaskChoice:
    return check_recipe({"tasks": [{"name": "mine", **fields}], "methods": ["finetune"]}).tasks[0]


def test_a_recipe_blends_files_folders_and_built_in_tasks(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    new = written(tmp_path, *[qa(question=f"new {i}") for i in range(40)])
    written(tmp_path / "folder", *[qa(question=f"old {i}") for i in range(40)], name="train.jsonl")
    written(tmp_path / "folder", qa(question="old test"), name="test.jsonl")
    parts = [{"path": str(new), "ratio": 3}, {"path": str(tmp_path / "folder"), "ratio": 1}, {"name": "easy_vqa", "ratio": 1, "cap": 9}]
    task = load_choice(choice(blend=parts, train_size=25))
    found = Counter("old" if "old" in sample.id or "old" in sample.question else sample.question[:3] for sample in task.train)
    assert len(task.train) == 25 and found["new"] == 15 and found["old"] == 5
    assert {"old test"} < {sample.question for sample in task.test}
    assert not {sample.question for sample in task.train} & {sample.question for sample in task.test if "new" in sample.question}
    given = load_choice(choice(blend=parts[:2], test_path=str(written(tmp_path, qa(question="other"), name="test.jsonl"))))
    assert [sample.question for sample in given.test] == ["other"]
    twice = read_choice(choice(blend=[parts[0], {"path": str(tmp_path / "folder" / ".." / "data.jsonl"), "ratio": 3}, parts[1]]))
    assert isinstance(twice.train, Blend) and len(twice.train.sources) == 2


def test_a_file_that_is_reached_by_two_paths_is_one_source_and_one_that_is_reached_in_part_is_refused(tmp_path: Path) -> None:
    train = written(tmp_path, *[qa(question=f"q{i}") for i in range(10)], name="train.jsonl")
    test = written(tmp_path, qa(question="t"), name="test.jsonl")
    (tmp_path / "link.jsonl").symlink_to(train)
    paths = (tmp_path, train, tmp_path / "tr*.jsonl", tmp_path / "link.jsonl")
    for given in ({"test_path": str(test)}, {}):
        blend = read_choice(choice(blend=[{"path": str(path), "ratio": 1} for path in paths], **given))
        assert [sample.question for sample in blend.test] == ["t"]
        assert len(blend.train) == len({sample.question for sample in blend.train}) == 10
    for both in ((paths[1], tmp_path / "t*.jsonl"), (tmp_path / "t*.jsonl", paths[1])):
        with pytest.raises(UserError, match=r"both hold .*train.jsonl, and one holds more. .* name every file in one source only"):
            read_choice(choice(blend=[{"path": str(path)} for path in both], test_path=str(test)))


def test_a_blend_in_a_recipe_is_checked_and_reads_back(tmp_path: Path) -> None:
    raw = {"tasks": [{"name": "mine", "blend": ["easy_vqa", {"path": "a.jsonl"}], "temperature": 2}], "methods": ["finetune"]}
    recipe = check_recipe(raw)
    (tmp_path / "recipe.yaml").write_text(write_recipe(recipe))
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    for part, says in (
        ({"blend": [{"ratio": 1}]}, "'tasks.0.blend.0.path': one of 'name' .* and 'path' is wanted"),
        ({"blend": [{"name": "a", "path": "b"}]}, "'tasks.0.blend.0.path' is 'b': .*one of 'name' .* and 'path' is wanted"),
        ({"path": "a", "blend": ["b"]}, "both 'path' and 'blend' are given"),
        ({"blend": [{"name": "a", "ratoi": 1}]}, "unknown key 'tasks.0.blend.0.ratoi'.*Did you mean 'ratio'"),
        ({"blend": [{"name": "a", "epochs": 0}]}, "'tasks.0.blend.0.epochs' is 0"),
        ({"blend": [{"name": "a", "ratio": math.inf}]}, "'tasks.0.blend.0.ratio' is inf"),
        ({"blend": ["a"], "temperature": math.nan}, "'tasks.0.temperature' is nan"),
    ):
        with pytest.raises(UserError, match=says):
            choice(**part)
    with pytest.raises(UserError, match=r"none of its sources is scored by ranked. Give test_path"):
        load_choice(choice(blend=["easy_vqa"], scoring="ranked"))


def test_newer_keys_at_their_defaults_leave_the_identity_of_a_cell_as_it_was() -> None:
    text = repr(TaskChoice(name="flags", train_size=3))
    assert text == "TaskChoice(name='flags', path=None, test_path=None, scoring='exact_match', train_size=3, test_size=None)"
    assert "ratio=2.0" in repr(TaskChoice(name="mine", blend=[{"name": "flags", "ratio": 2}]))
