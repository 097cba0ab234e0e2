"""Claims about train and test rows: the same on every machine, none on both sides."""

import random
from pathlib import Path
from typing import Any

import pytest

from alula.data import read_task
from alula.data.readers import read_test
from alula.errors import UserError
from alula.files import write_jsonl
from data_files import put_pictures, qa, written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put_pictures(tmp_path)


def split_names(path: Path, **options: Any) -> tuple[set[str], set[str]]:
    task = read_task("colours", path, **options)
    return {sample.question for sample in task.train}, {sample.question for sample in task.test}


def test_the_split_depends_on_what_samples_say_and_not_on_their_order(folder: Path) -> None:
    rows = [qa(question=f"q{i}", image=f"{'ab'[i % 2]}.png") for i in range(200)]
    train, test = split_names(written(folder, *rows), test_ratio=0.2)
    assert not train & test and len(train | test) == 200 and 20 <= len(test) <= 60
    random.Random(1).shuffle(rows)
    assert split_names(written(folder, *rows), test_ratio=0.2) == (train, test)
    assert split_names(written(folder, *rows), test_ratio=0.2, seed=1) != (train, test)
    more = [qa(question=f"new{i}") for i in range(50)]
    train_more, test_more = split_names(written(folder, *more, *rows), test_ratio=0.2)
    assert train <= train_more and test <= test_more


def test_equal_samples_and_equal_ids_stay_on_one_side(folder: Path) -> None:
    rows = [qa(question=f"q{i // 2}") for i in range(100)]
    rows += [qa(id=f"picture{i // 5}", question=f"r{i}") for i in range(200)]
    task = read_task("colours", written(folder, *rows), test_ratio=0.3)
    assert len(task.train) + len(task.test) == 300
    for side, other in ((task.train, task.test), (task.test, task.train)):
        assert not {s.question for s in side if s.question[0] == "q"} & {s.question for s in other}
        assert not {s.id for s in side} & {s.id for s in other}


def test_neither_side_of_a_split_is_empty(folder: Path) -> None:
    for ratio in (0.001, 0.999):
        train, test = split_names(written(folder, qa(question="a"), qa(question="b")), test_ratio=ratio)
        assert len(train) == len(test) == 1
    with pytest.raises(UserError, match=r"cannot be split. Add samples"):
        split_names(written(folder, qa(), qa()))
    with pytest.raises(UserError, match=r"test_ratio is 1.5"):
        split_names(written(folder, qa(), qa(question="b")), test_ratio=1.5)


def test_a_folder_holds_train_and_test(folder: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of train.jsonl"):
        read_task("colours", folder)
    written(folder, *[qa(question=f"q{i}") for i in range(20)], name="train.jsonl")
    assert len(read_task("colours", folder).test) > 0
    written(folder, qa(question="t"), name="test.jsonl")
    task = read_task("colours", folder, scoring="ranked", max_new_tokens=3)
    assert (len(task.train), len(task.test), task.scoring, task.max_new_tokens) == (20, 1, "ranked", 3)
    written(folder, qa(question="q3"), name="test.jsonl")
    with pytest.raises(UserError, match=r"test.jsonl:1: this test sample is also a training sample \(train.jsonl:4\)"):
        read_task("colours", folder)
    (folder / "test.json").write_text("[]")
    with pytest.raises(UserError, match=r"holds test.jsonl, test.json. Keep one"):
        read_task("colours", folder)


def test_room_for_an_answer_follows_the_longest_one(tmp_path):
    rows = [{"question": f"What is {i}?", "answer": "word " * 40 + str(i)} for i in range(30)]
    write_jsonl(tmp_path / "long.jsonl", rows)
    assert read_task("long", tmp_path / "long.jsonl").max_new_tokens > 100
    test = read_test("long", tmp_path / "long.jsonl")
    assert (len(test.train), len(test.test)) == (0, 30) and test.max_new_tokens > 100
