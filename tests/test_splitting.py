"""Claims about train and test rows: the same on every machine, none on both sides."""

import random
from pathlib import Path
from typing import Any

import pytest

from alula.config import check_recipe
from alula.data import read_samples, read_task
from alula.data.choices import TaskChoice
from alula.data.readers import read_test
from alula.data.splitting import refuse_shared
from alula.errors import UserError
from alula.files import write_jsonl
from alula.running.choices import load_choice, load_stream
from data_files import png, put_pictures, qa, written


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


def test_pictures_are_told_apart_by_their_content_and_not_by_their_names(tmp_path: Path) -> None:
    rows = [qa(image=f"{i}/image.png", answer="no" if i % 3 else "yes") for i in range(60)]
    for i in range(60):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "image.png").write_bytes(png(i))
    task = read_task("colours", written(tmp_path, *rows), test_ratio=0.3)
    assert {sample.answer for sample in task.train} == {sample.answer for sample in task.test} == {"no", "yes"}
    assert 8 <= len(task.test) <= 28
    train, other = written(tmp_path, qa(image="1/image.png")), written(tmp_path, qa(image="2/image.png"), name="test.jsonl")
    assert len(read_task("colours", train, test_path=other).test) == 1
    (tmp_path / "renamed.png").write_bytes(png(1))
    same = written(tmp_path, qa(image="renamed.png"), name="test.jsonl")
    with pytest.raises(UserError, match=r"test.jsonl:1: this test sample is also a training sample \(data.jsonl:1\)"):
        read_task("colours", train, test_path=same)
    samples = read_samples(same)
    (tmp_path / "renamed.png").unlink()
    with pytest.raises(UserError, match=r"test.jsonl:1: no image file .*renamed.png"):
        refuse_shared(samples, samples)


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


def test_of_a_base_task_nothing_is_held_out_unless_its_data_has_test_rows(tmp_path: Path) -> None:
    rows = [{"question": f"Is {number} a number?", "answer": "yes"} for number in range(23)]
    for folder in ("both", "alone"):
        (tmp_path / folder).mkdir()
    for name in ("both/train.jsonl", "alone/train.jsonl"):
        write_jsonl(tmp_path / name, rows[:20])
    write_jsonl(tmp_path / "both/test.jsonl", rows[20:])
    file = {"path": tmp_path / "alone/train.jsonl"}
    bases = {"file": file, "cut": {**file, "test_size": 7}, "two files": {**file, "test_path": tmp_path / "both/test.jsonl"}}
    bases |= {"folder": {"path": tmp_path / "alone"}, "two in a folder": {"path": tmp_path / "both"}}
    base_tasks = [{"name": name, **base} for name, base in bases.items()]
    stream = load_stream(check_recipe({"tasks": [{"name": "learnt", **file}], "base_tasks": base_tasks, "methods": ["finetune"]}))
    (learnt,) = stream.tasks
    assert len(learnt.train) + len(learnt.test) == 20 and 0 < len(learnt.test) < 7
    assert all(task.is_base for task in stream.base_tasks)
    counts = {task.name: (len(task.train), len(task.test)) for task in stream.base_tasks}
    assert counts == {"file": (0, 20), "cut": (0, 7), "folder": (0, 20), "two files": (20, 3), "two in a folder": (20, 3)}


def test_a_built_in_task_is_scored_as_asked_or_the_asking_is_refused() -> None:
    captions = TaskChoice(name="captions", scoring="bits_per_byte", train_size=1, test_size=1)
    assert load_choice(captions).scoring == "bits_per_byte"
    assert load_choice(TaskChoice(name="capital", train_size=1, test_size=1)).scoring == "ranked"
    with pytest.raises(UserError, match="'ranked' came, but it is scored by exact_match"):
        load_choice(TaskChoice(name="captions", scoring="ranked", train_size=1, test_size=1))
