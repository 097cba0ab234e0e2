"""Claims about data files: every usual form is read, and what cannot be read is named by file and line."""

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from alula.data import Sample, check_images, read_samples, read_task
from alula.data.readers import read_test
from alula.errors import UserError
from alula.files import write_jsonl


def png(shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    return tmp_path


def written(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_one(folder: Path, row: Any) -> Sample:
    (sample,) = read_samples(written(folder, row))
    return sample


def contents(sample: Sample) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in sample.messages]


ASKED = [("user", "<image>\nwhat?"), ("assistant", "red")]
DATA_URI = "data:image/png;base64," + base64.b64encode(png()).decode()
FORMS = {
    "llava": {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]},
    "llava list": {
        "image": ["a.png"],
        "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}],
    },
    "messages": {
        "images": ["a.png"],
        "messages": [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "red"}],
    },
    "messages, one image as a string": {
        "images": "a.png",
        "messages": [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "red"}],
    },
    "typed parts": {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        ],
    },
    "image_url": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "\nwhat?"}]},
            {"role": "assistant", "content": "red"},
        ]
    },
    "no placeholder": {"image": "a.png", "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]},
    "question": {"image": "a.png", "question": "what?", "answer": "red"},
    "prompt as text": {"image": "a.png", "prompt": "what?", "completion": "red"},
    "prompt as messages": {
        "images": ["a.png"],
        "prompt": [{"role": "user", "content": "what?"}],
        "completion": [{"role": "assistant", "content": "red"}],
    },
    "texts": {"images": ["a.png"], "texts": [{"user": "what?", "assistant": "red"}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_sample(folder: Path, form: str) -> None:
    sample = read_one(folder, FORMS[form])
    assert contents(sample) == ASKED
    assert sample.images == (folder / "a.png",)
    assert (sample.id, sample.origin, sample.language) == ("data.jsonl:1", "data.jsonl:1", "en")


def test_ids_options_and_accepted_answers_are_kept(folder: Path) -> None:
    row = {"id": 7, "question": "how many?", "answer": ["2", "two"], "options": ["1", "2"], "language": "sw", "source": "x"}
    sample = read_one(folder, row)
    assert (sample.id, sample.answer, sample.accepted, sample.options, sample.language) == ("7", "2", ("two",), ("1", "2"), "sw")
    assert sample.images == ()


def test_running_text_is_one_answer(folder: Path) -> None:
    assert contents(read_one(folder, {"text": "Once upon a time."})) == [("assistant", "Once upon a time.")]


def test_images_follow_their_placeholders_through_turns_and_parts(folder: Path) -> None:
    row = {
        "images": ["b.png"],
        "messages": [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "and"}, {"type": "image"}]},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": [{"type": "image_url", "image_url": DATA_URI}]},
            {"role": "assistant", "content": "two"},
        ],
    }
    sample = read_one(folder, row)
    assert contents(sample)[1][1] == "<image>and<image>"
    assert sample.images == (folder / "a.png", folder / "b.png", png())
    assert [image.size for image in sample.open_images()] == [(4, 4)] * 3


def test_two_images_without_placeholders_come_first(folder: Path) -> None:
    sample = read_one(folder, {"images": ["a.png", "b.png"], "question": "same?", "answer": "yes"})
    assert sample.messages[0].content == "<image>\n<image>\nsame?"
    assert sample.images == (folder / "a.png", folder / "b.png")


def test_relative_images_start_at_image_root(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = written(tmp_path_factory.mktemp("elsewhere"), FORMS["llava"])
    with pytest.raises(UserError, match=r"^data.jsonl:1: no image file .*a\.png.*image_root"):
        read_samples(path)
    assert read_samples(path, image_root=folder)[0].images == (folder / "a.png",)


def test_json_lists_keep_their_lines(folder: Path) -> None:
    path = folder / "data.json"
    path.write_text("\ufeff" + json.dumps([{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}], indent=1))
    assert [sample.origin for sample in read_samples(path)] == ["data.json:2", "data.json:6"]
    path.write_text('[{"question": "a", "answer": "b"},\n{"question": "c", "answer": ""}]')
    with pytest.raises(UserError, match=r"^data.json:2: the answer is empty"):
        read_samples(path)
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n')
    assert [sample.origin for sample in read_samples(path)] == ["data.json:1", "data.json:2"]


def test_line_separators_inside_strings_do_not_end_a_line(folder: Path) -> None:
    path = folder / "data.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": "c\x85"}\n\n{"text": "d"}\n', encoding="utf-8")
    assert [sample.origin for sample in read_samples(path)] == ["data.jsonl:1", "data.jsonl:3"]


def test_parquet_rows_hold_their_images(folder: Path) -> None:
    rows = [
        {"image": {"bytes": png(), "path": "x.png"}, "images": None, "question": "what?", "answer": "red", "text": None},
        {"image": None, "images": [{"bytes": None, "path": "b.png"}], "question": "what?", "answer": "red", "text": None},
        {"image": None, "images": None, "question": None, "answer": None, "text": "prose"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "data.parquet")
    first, second, third = read_samples(folder / "data.parquet")
    assert contents(first) == contents(second) == ASKED
    assert (first.images, second.images, third.images) == ((png(),), (folder / "b.png",), ())
    assert third.origin == "data.parquet:3"


def qa(**fields: Any) -> dict[str, Any]:
    return {"question": "what?", "answer": "red", **fields}


def chat(*turns: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **fields}


BAD_ROWS = {
    "too few images": (chat(("user", "<image> <image>"), ("assistant", "a"), image="a.png"), "2 '<image>' placeholders but 1 images"),
    "too many images": (chat(("user", "<image>"), ("assistant", "a"), images=["a.png", "b.png"]), "1 '<image>' placeholders but 2 images"),
    "missing image": (qa(image="c.png"), "no image file .*c.png. Correct the path"),
    "web image": (qa(image="https://example.org/a.png"), "is a web address. Download"),
    "broken data URI": (qa(image="data:image/png;base64,***"), "not valid base64"),
    "image of another type": (qa(image=3), "an image is int 3. A path"),
    "two image columns": (qa(image="a.png", images=["b.png"]), "both 'image' and 'images'"),
    "empty answer": (qa(answer=" "), "the answer is empty. Give the text"),
    "empty answer in between": (chat(("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "c")), "the answer is empty"),
    "no answer": (chat(("user", "a")), "the last message must be the assistant's"),
    "image in an answer": (chat(("user", "a"), ("assistant", "<image>"), image="a.png"), "an assistant message holds '<image>'"),
    "answer not among the options": (qa(options=["blue", "green"]), "'red' is not among the options"),
    "option of another type": (qa(options=[True]), "'options' is bool True"),
    "unknown form": ({"query": "a", "response": "b"}, r"no known row form in the keys \['query', 'response'\].*'question' \+ 'answer'"),
    "half a form": ({"question": "a"}, "Add 'answer' to the row"),
    "misspelt key": (qa(imges=["a.png"]), "unknown key 'imges'.*Did you mean 'images'"),
    "image under another name": (qa(image_path="a.png"), "unknown key 'image_path'.*Known: .*image"),
    "video": (qa(videos=["a.mp4"]), "'videos' cannot be read"),
    "unknown role": (chat(("user", "a"), ("tool", "b"), ("assistant", "c")), "role 'tool'. Known: system, user"),
    "message without content": (chat(("user", None), ("assistant", "c")), r"messages\[0\] has the content NoneType None"),
    "message of another type": ({"messages": ["a"]}, r"messages\[0\] is str 'a', an object"),
    "messages of another type": ({"messages": "a"}, "'messages' is str 'a', a list of messages"),
    "loss per message": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]},
        r"messages\[1\] has 'loss'",
    ),
    "unknown part": (chat(("user", [{"type": "audio"}]), ("assistant", "c")), "a content part is dict {'type': 'audio'}. Known"),
    "question of another type": (qa(question=3), "'question' is int 3"),
    "images without a question": ({"text": "a", "image": "a.png"}, "1 images, but no user message"),
    "row of another type": ([1], "a list came, an object with keys is wanted"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(folder: Path, case: str) -> None:
    row, message = BAD_ROWS[case]
    path = written(folder, qa(), row)
    with pytest.raises(UserError, match=rf"(?s)^data\.jsonl:2: .*{message}"):
        read_samples(path)


def test_a_bad_file_is_named_with_a_remedy(folder: Path) -> None:
    broken = folder / "data.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"data.jsonl:2: not valid JSON.*Correct"):
        read_samples(broken)
    for text, line in (('[{"text": "a"},\n{"text": ', 2), ('[{"text": "a"}\n\n', 3), ('[{"text": "a"}\n{"text": "b"}]', 2)):
        (folder / "data.json").write_text(text)
        with pytest.raises(UserError, match=rf"data.json:{line}: "):
            read_samples(folder / "data.json")
    for content, name, message in ((b"", "e.jsonl", "holds no rows"), (b"\xff\xfe", "u.jsonl", "UTF-8"), (b"PAR1", "p.parquet", "parquet")):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_samples(folder / name)
    with pytest.raises(UserError, match=r"unknown ending '.csv'. Known: .jsonl"):
        read_samples(folder / "data.csv")
    with pytest.raises(UserError, match="No file"):
        read_samples(folder / "absent.jsonl")


def test_broken_images_are_found_all_at_once(folder: Path) -> None:
    (folder / "b.png").write_bytes(png()[:40])
    samples = read_samples(written(folder, qa(image="a.png"), qa(image="b.png"), qa(), qa(images=["a.png", "b.png"])))
    check_images(samples[:1])
    with pytest.raises(UserError, match=r"(?s)2 of 4 samples.*data.jsonl:2: .*b.png cannot be read.*data.jsonl:4: "):
        check_images(samples)


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
