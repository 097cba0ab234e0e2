"""Claims about files: every format gives the same samples, and what cannot be read is named with a remedy."""

import io
import itertools
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from alula.data import read_samples, read_task, stream_samples
from alula.data.choices import TaskChoice, read_choice
from alula.data.formats import FORMATS, read_lines
from alula.data.sample import BadRow
from alula.errors import UserError
from data_files import contents, png, put_pictures, qa, written
from test_readers import ASKED


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return put_pictures(tmp_path)


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


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def as_json(row: Any) -> bytes:
    return json.dumps(row).encode()


def dataset() -> datasets.Dataset:
    rows = [{"image": {"bytes": png(shade), "path": None}, **qa(question="what?")} for shade in range(3)]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def write_json(folder: Path) -> Path:
    return written(folder, {"image": "a.png", **qa()}, name="rows.jsonl")


def write_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist([{"image": {"bytes": png(), "path": "a.png"}, **qa()}]), folder / "rows.parquet")
    return folder / "rows.parquet"


def write_saved_dataset(folder: Path) -> Path:
    dataset().select([0]).save_to_disk(folder / "saved")
    return folder / "saved"


def write_webdataset(folder: Path) -> Path:
    return tar(folder / "rows.tar", ("0.png", png()), ("0.json", as_json(qa())))


WRITERS = {"json": write_json, "parquet": write_parquet, "saved_dataset": write_saved_dataset, "webdataset": write_webdataset}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_sample(name: str, folder: Path) -> None:
    (sample,) = read_samples(WRITERS[name](folder))
    assert contents(sample) == ASKED
    (image,) = sample.open_images()
    assert image.tobytes() == Image.open(io.BytesIO(png())).tobytes()
    assert sample.origin in ("rows.jsonl:1", "rows.parquet:1", "rows.tar:1", "saved:1")


@pytest.mark.parametrize("name", FORMATS)
def test_a_recipe_names_data_of_every_format(name: str, folder: Path) -> None:
    test = written(folder, {"image": "a.png", **qa(question="new?")}, name="test.jsonl")
    task = read_choice(TaskChoice(name="mine", path=WRITERS[name](folder), test_path=test))
    assert (contents(task.train[0]), task.test[0].question) == (ASKED, "new?")
    assert task.train[:1][0].answer == "red"


def test_samples_of_a_data_set_reach_another_process() -> None:
    again = pickle.loads(pickle.dumps(read_samples(dataset())))
    assert [sample.images for sample in again] == [(png(shade),) for shade in range(3)]


def test_a_tar_may_mix_captions_text_and_several_images(folder: Path) -> None:
    path = tar(
        folder / "mixed.tar",
        ("00/0.jpg", png(1)),
        ("00/0.txt", b"a red square"),
        ("00/1.json", as_json({"text": "prose"})),
        ("00/2.left.png", png(2)),
        ("00/2.right.png", png(3)),
        ("00/2.json", as_json({"images": ["right.png", "2.left.png"], **qa(options=["red", "blue"])})),
        ("00/.hidden", b""),
        ("00/3.png", png(4)),
        ("00/3.json", as_json({"conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]})),
    )
    caption, prose, pair, llava = read_samples(path)
    assert (caption.answer, caption.images, caption.question, caption.id) == ("a red square", (png(1),), "", "00/0")
    assert (contents(prose), prose.images) == ([("assistant", "prose")], ())
    assert (pair.images, pair.options) == ((png(3), png(2)), ("red", "blue"))
    assert contents(llava) == ASKED


def test_a_bad_member_is_one_bad_row_and_a_cut_tar_is_named(folder: Path) -> None:
    lost = ("2.json", as_json({"image": "x.png", **qa()}))
    path = tar(folder / "bad.tar", ("0.json", b"{"), ("1.json", as_json([1])), lost, ("3.json", as_json(qa())))
    found = list(read_lines(path))
    assert [isinstance(line.row, BadRow) for line in found] == [True, True, False, False]
    with pytest.raises(UserError, match=r"bad.tar:1: the text of '0' is not valid"):
        read_samples(path)
    with pytest.raises(UserError, match=r"bad.tar:3: no image file .*x.png"):
        list(stream_samples(tar(path, ("0.json", as_json(qa())), ("1.json", as_json(qa())), lost)))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"bad.tar is not a whole tar file .*Download"):
        list(read_lines(path))


def test_shards_are_read_in_the_order_of_their_names(folder: Path) -> None:
    for shard in (1, 0, 2):
        written(folder, qa(question=f"q{shard}"), name=f"train-0000{shard}.jsonl")
    assert [sample.question for sample in read_samples(folder / "train-*.jsonl")] == ["q0", "q1", "q2"]
    with pytest.raises(UserError, match=r"No file fits .*test-\*.jsonl"):
        read_samples(folder / "test-*.jsonl")


def test_a_format_can_be_named_where_no_ending_tells_it(folder: Path) -> None:
    path = written(folder, qa(), name="rows")
    with pytest.raises(UserError, match=r"rows has no ending. Known formats: json, parquet, saved_dataset, webdataset"):
        read_samples(path)
    assert len(read_samples(path, format="json")) == 1
    with pytest.raises(UserError, match=r"Unknown format 'jsn'.*Did you mean 'json'"):
        read_samples(path, format="jsn")


def test_a_live_data_set_is_read_row_by_row_and_its_images_stay_as_they_are_stored() -> None:
    samples = read_samples(dataset())
    assert len(samples) == 3
    assert contents(samples[1]) == ASKED
    assert [sample.images for sample in samples[1:]] == [(png(1),), (png(2),)]
    assert samples[-1].origin == "dataset:3"
    assert samples[0] is not samples[0]  # made when asked for
    task = read_task("shades", dataset(), test_ratio=0.4)
    assert sorted(sample.origin for sample in (*task.train, *task.test)) == ["dataset:1", "dataset:2", "dataset:3"]


def test_a_streamed_data_set_is_read_no_further_than_it_is_asked() -> None:
    pulled = []

    def rows() -> Any:
        for number in itertools.count():
            pulled.append(number)
            yield {"image": Image.new("RGB", (4, 4), (number, 0, 0)), **qa()}

    endless = datasets.IterableDataset.from_generator(rows)
    few = list(itertools.islice(stream_samples(endless), 2))
    assert [sample.open_images()[0].getpixel((0, 0)) for sample in few] == [(0, 0, 0), (1, 0, 0)]
    assert len(pulled) <= 3
    stored = dataset().to_iterable_dataset()
    assert [sample.images for sample in stream_samples(stored)] == [(png(shade),) for shade in range(3)]
    assert [sample.origin for sample in read_samples(stored)] == ["dataset:1", "dataset:2", "dataset:3"]


def test_what_is_no_single_data_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"A DatasetDict came. One of its splits is wanted: train, test"):
        read_samples(datasets.DatasetDict({"train": dataset(), "test": dataset()}))
    with pytest.raises(UserError, match=r"A dict came. A path, a datasets.Dataset"):
        read_samples({})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="The data set holds no rows"):
        read_samples(dataset().to_iterable_dataset().take(0))
    broken = datasets.Dataset.from_list([qa(), qa(answer="")])
    with pytest.raises(UserError, match="dataset:2: the answer is empty"):
        read_samples(broken)


def test_a_saved_dict_of_splits_is_a_task(folder: Path) -> None:
    rows = [datasets.Dataset.from_list([qa(question=f"{split}{i}") for i in range(2)]) for split in ("train", "test")]
    datasets.DatasetDict(dict(zip(("train", "test"), rows, strict=True))).save_to_disk(folder / "both")
    task = read_task("colours", folder / "both")
    assert [[sample.question for sample in side] for side in (task.train, task.test)] == [["train0", "train1"], ["test0", "test1"]]
    (folder / "both" / "test" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="not a whole saved data set"):
        read_samples(folder / "both" / "test")


def test_the_folders_of_coin_and_ucit_find_their_images_and_test_rows(tmp_path: Path) -> None:
    row = {"question_id": 1, "image": "./TextVQA/images/1.png", "text": "what?", "answer": "red"}
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    taught = {"id": "0", "image": "TextVQA/images/0.png", "conversations": turns}
    for root, images, test in (("coin", "cl_dataset", "test.json"), ("ucit", "datasets", "test_3000.json")):
        pictures = tmp_path / root / images / "TextVQA" / "images"
        task = tmp_path / root / ("playground/Instructions" if root == "coin" else "") / "TextVQA"
        for folder in (pictures, task):
            folder.mkdir(parents=True)
        for number in (0, 1):
            (pictures / f"{number}.png").write_bytes(png(number))
        (task / "train.json").write_text(json.dumps([taught]))
        (task / test).write_text(json.dumps([row]))
        found = read_task("TextVQA", task)
        assert [sample.open_images()[0].getpixel((0, 0)) for sample in (*found.train, *found.test)] == [(0, 0, 0), (1, 0, 0)]
        assert contents(found.test[0]) == ASKED
        with pytest.raises(UserError, match=r"no image file .*elsewhere.*image_root"):
            read_task("TextVQA", task, image_root=tmp_path / "elsewhere")


def test_a_folder_of_parquet_shards_is_a_task(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split, number in (("train", 0), ("train", 1), ("test", 0)):
        table = pa.Table.from_pylist([{"image": {"bytes": png(number), "path": None}, **qa(question=f"{split}{number}")}])
        pq.write_table(table, tmp_path / "data" / f"{split}-{number:05}-of-00002.parquet")
    task = read_task("colours", tmp_path)
    assert [sample.question for sample in (*task.train, *task.test)] == ["train0", "train1", "test0"]
    written(tmp_path / "data", qa(), name="train-00002.jsonl")
    with pytest.raises(UserError, match=r"train files with the endings .jsonl, .parquet. Keep one kind"):
        read_task("colours", tmp_path)
