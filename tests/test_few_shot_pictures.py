"""Claims about shots that are the question itself: its picture is known by its pixels, and found at the least cost."""

import io
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from alula.data.interleaved.embedding import tf_idf
from alula.data.sample import Sample
from alula.data.stream import Task
from alula.evaluation.few_shot import few_shot
from zoo.parts import picture


def kinds_of(image, folder):
    """One picture in every way that a sample may hold it."""
    (folder / "a").mkdir()
    for path in (folder / "a" / "one.png", folder / "other.png", folder / "whole.bmp"):
        image.save(path)
    stored = io.BytesIO()
    image.save(stored, "png", compress_level=0)
    relative = Path(os.path.relpath(folder / "other.png"))
    return [
        image,
        stored.getvalue(),
        folder / "a" / "one.png",
        folder / "other.png",
        folder / "whole.bmp",
        folder / "a/../other.png",
        relative,
    ]


@pytest.mark.parametrize("by", ["seed", "similarity"])
def test_a_picture_is_the_same_by_its_pixels_whatever_it_is_called_and_however_it_came(by, tmp_path):
    image, further = picture(1, 40, 60), picture(2, 40, 60)
    train = [
        Sample.ask("what colour?", "red", images=(source,), id=f"train/{index}") for index, source in enumerate(kinds_of(image, tmp_path))
    ]
    others = [
        Sample.ask("what colour?", "blue", images=(further,), id="picture"),
        Sample.ask("how many?", "2", images=(image,), id="words"),
    ]
    test = [replace(sample, id=f"test/{index}") for index, sample in enumerate(train)]
    found = few_shot(Task(name="t", train=[*train, *others], test=test), shots=9, by=by, embed=tf_idf)
    assert found.counts == (2,) * len(test)
    assert all(sample.images[:-1] in [(image, further), (further, image)] for sample in found.task.test)


def test_pictures_are_decoded_once_and_only_where_the_words_are_the_same(tmp_path, monkeypatch):
    def rows(name, questions):
        for index in range(8):
            picture(index, 20, 20).save(tmp_path / f"{name}{index}.png")
        return [
            Sample.ask(questions[index % 4], "red", images=(tmp_path / f"{name}{index}.png",), id=f"{name}/{index}") for index in range(8)
        ]

    opened, whole = Counter(), Sample.open_images
    monkeypatch.setattr(Sample, "open_images", lambda sample: opened.update([sample.id]) or whole(sample))
    task = Task(name="t", train=rows("train", ("a?", "b?", "c?", "d?")), test=rows("test", ("a?", "b?", "x?", "y?")))
    for by in ("seed", "similarity"):
        opened.clear()
        assert few_shot(task, shots=8, by=by, embed=tf_idf).counts == (7, 7, 8, 8, 7, 7, 8, 8)
        assert opened == {f"{name}/{index}": 1 for name in ("train", "test") for index in (0, 1, 4, 5)}
    opened.clear()
    few_shot(task, shots=0)
    assert not opened
