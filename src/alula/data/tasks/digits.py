"""Pairs of real handwritten digits: read them, add them, or name the larger one.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998), https://doi.org/10.24432/C50P49.
"""

import random
from typing import Any

from PIL import Image

from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.drawing import encode
from alula.data.tasks.selection import answer_tokens, generator
from alula.data.tasks.table import INFO, TASKS, TaskInfo

NAME = "digits"
SIZES = {"train": 3000, "test": 500}
WIDTH, HEIGHT, DIGIT = 96, 64, 40
"""Pixels."""
INFO.register(NAME)(
    TaskInfo(
        summary="Which two handwritten digits are shown, what is their sum, which is the larger.",
        languages=("en",),
        licence="CC-BY-4.0",
        blind=0.11,
        held_out="397 digits that are in no train pair; they come last in the published file, where writers come in runs",
    )
)


@TASKS.register(NAME)
def build(*, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """Pairs drawn anew for each seed."""
    rows = read_table(NAME)
    splits = {}
    for split, size in (("train", train_size), ("test", test_size)):
        pool = [row for row in rows if row["split"] == split]
        count = SIZES[split] if size is None else min(size, SIZES[split])
        splits[split] = [_sample(pool, split, index, generator(NAME, split, seed, index)) for index in range(count)]
    tokens = answer_tokens(splits["train"] + splits["test"])
    return Task(name=NAME, train=splits["train"], test=splits["test"], max_new_tokens=tokens, description=str(INFO[NAME]))


def _sample(pool: list[dict[str, Any]], split: str, index: int, rng: random.Random) -> Sample:
    pair = rng.choices(pool, k=2)
    left, right = (row["digit"] for row in pair)
    question, answer = (
        ("Which digits are written?", f"{left}{right}"),
        ("What is the sum of the two digits?", str(left + right)),
        ("What is the larger digit?", str(max(left, right))),
    )[index % 3]
    image = encode(_draw([row["pixels"] for row in pair], rng))
    return Sample.ask(question, answer, images=(image,), id=f"{NAME}/{split}/{index}", origin=NAME)


def _draw(digits: list[bytes], rng: random.Random) -> Image.Image:
    """Dark ink on white; the 8x8 pixels have the values 0 to 16."""
    image = Image.new("L", (WIDTH, HEIGHT), 255)
    for position, pixels in enumerate(digits):
        ink = Image.frombytes("L", (8, 8), bytes(255 - min(255, value * 16) for value in pixels))
        ink = ink.resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)
        image.paste(ink, (3 + position * 47 + rng.randint(0, 4), rng.randint(4, HEIGHT - DIGIT - 4)))
    return image
