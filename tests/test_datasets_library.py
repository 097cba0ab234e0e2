"""Claims about data sets of the ``datasets`` library: labels are learnt by their names, and transforms are applied."""

from pathlib import Path

import datasets
import pytest
from PIL import Image

from alula.data import read_samples
from alula.errors import UserError
from data_files import qa

ANIMAL = datasets.ClassLabel(names=["cat", "dog"])


def labelled() -> datasets.Dataset:
    features = {"question": datasets.Value("string"), "answer": ANIMAL, "options": datasets.List(ANIMAL)}
    rows = {"question": ["which?", "and this?"], "answer": [1, 0], "options": [[0, 1], [1, 0]]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def in_memory(folder: Path) -> datasets.Dataset:
    return labelled()


def streamed(folder: Path) -> datasets.IterableDataset:
    return labelled().to_iterable_dataset()


def saved(folder: Path) -> Path:
    labelled().save_to_disk(folder / "saved")
    return folder / "saved"


def shards(folder: Path) -> str:
    labelled().save_to_disk(folder / "saved")
    return str(folder / "sav*")


def parquet(folder: Path) -> Path:
    labelled().to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


@pytest.mark.parametrize("given", [in_memory, streamed, saved, shards, parquet])
def test_class_labels_are_learnt_by_their_names(given, tmp_path: Path) -> None:
    samples = read_samples(given(tmp_path))
    assert [(sample.answer, sample.options) for sample in samples] == [("dog", ("cat", "dog")), ("cat", ("dog", "cat"))]


def test_class_labels_inside_messages_are_learnt_by_their_names() -> None:
    role = datasets.ClassLabel(names=["user", "assistant"])
    features = datasets.Features({"messages": datasets.List({"role": role, "content": datasets.Value("string")})})
    rows = {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}
    (sample,) = read_samples(datasets.Dataset.from_dict(rows, features=features))
    assert [message.role for message in sample.messages] == ["user", "assistant"]


def test_a_row_without_a_label_is_refused() -> None:
    unlabelled = datasets.Dataset.from_dict({"question": ["a"], "answer": [-1]}).cast_column("answer", ANIMAL)
    with pytest.raises(UserError, match=r"dataset:1: no known row form .*Add 'answer'"):
        read_samples(unlabelled)


def test_a_transform_of_the_users_is_applied() -> None:
    rows = datasets.Dataset.from_list([{"picture": Image.new("RGB", (4, 4), (9, 0, 0)), **qa(question=str(i))} for i in range(3)])

    def asked(batch: dict[str, list]) -> dict[str, list]:
        return {"image": batch["picture"], "question": [f"{text}?" for text in batch["question"]], "answer": batch["answer"]}

    samples = read_samples(rows.with_transform(asked))
    assert [sample.question for sample in samples] == ["0?", "1?", "2?"]
    assert samples[-1].open_images()[0].getpixel((0, 0)) == (9, 0, 0)
