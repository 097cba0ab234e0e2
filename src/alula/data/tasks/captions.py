"""One-sentence descriptions of composed pictures: what `alula align` teaches a fresh connector. Part of no stream."""

import random
from typing import Any

from PIL import Image

from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.drawing import Colour, decode, encode
from alula.data.tasks.selection import answer_tokens, generator
from alula.data.tasks.table import INFO, TASKS, TaskInfo

NAME = "captions"
SIZES = {"train": 6000, "test": 400}
SIDE = 128
"""Pixels."""
GROUNDS: dict[str, Colour] = {
    "white": (252, 252, 252),
    "pink": (250, 190, 205),
    "yellow": (250, 235, 140),
    "blue": (150, 195, 245),
    "green": (165, 225, 160),
    "gray": (185, 185, 185),
    "orange": (250, 185, 110),
    "purple": (200, 165, 235),
    "black": (25, 25, 25),
}
COUNTS = {1: "one", 2: "two", 3: "three"}
INFO.register(NAME)(
    TaskInfo(
        summary="Which things are there, on which side, on which ground: sentences to align a connector with.",
        languages=("en",),
        licence="CC-BY-4.0, Apache-2.0 and MIT pictures, Unicode-3.0 names",
        blind=0.0,
        held_out="the drawings of a vendor (Noto) that is not in train",
    )
)


@TASKS.register(NAME)
def build(*, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """Pictures composed anew for each seed from the sprites of `emoji_en`."""
    splits = {}
    for split, size in (("train", train_size), ("test", test_size)):
        count, own = SIZES[split] if size is None else min(size, SIZES[split]), sprites(split)
        splits[split] = [draw(own, split, index, seed=seed) for index in range(count)]
    tokens = answer_tokens(splits["train"] + splits["test"])
    return Task(name=NAME, train=splits["train"], test=splits["test"], max_new_tokens=tokens, description=str(INFO[NAME]))


def sprites(split: str) -> list[dict[str, Any]]:
    """What is drawn in the pictures of a split."""
    return [row for row in read_table("emoji") if row["plural"] and row["split"] == split]


def draw(rows: list[dict[str, Any]], split: str, index: int, *, seed: int) -> Sample:
    """One sample, the same however many there are."""
    rng = generator(NAME, split, seed, index)
    ground = rng.choice(sorted(GROUNDS))
    scene = Image.new("RGBA", (SIDE, SIDE), (*GROUNDS[ground], 255))
    if rng.random() < 0.5:
        row = rng.choice(rows)
        _paste(scene, decode(row["image"]), rng, box=(0, 0, SIDE, SIDE))
        said = f"one {row['en']}"
    else:
        is_beside = rng.random() < 0.5
        words = ("on the left", "on the right") if is_beside else ("at the top", "at the bottom")
        half = SIDE // 2
        halves = ((0, 0, half, SIDE), (half, 0, SIDE, SIDE)) if is_beside else ((0, 0, SIDE, half), (0, half, SIDE, SIDE))
        parts = []
        for place, box in zip(words, halves, strict=True):
            row, count = rng.choice(rows), rng.randint(1, 3)
            for place_of_one in range(count):
                _paste(scene, decode(row["image"]), rng, box=_slice(box, place_of_one, count, is_tall=is_beside))
            parts.append(f"{COUNTS[count]} {row['en'] if count == 1 else row['plural']} {place}")
        said = " and ".join(parts)
    return Sample.ask(
        "Describe the picture.", f"{said}, {ground} ground", images=(encode(scene),), id=f"{NAME}/{split}/{index}", origin=NAME
    )


def _slice(box: tuple[int, int, int, int], index: int, count: int, *, is_tall: bool) -> tuple[int, int, int, int]:
    """The `index`-th of `count` equal parts of a box along its longer edge."""
    left, top, right, bottom = box
    if is_tall:
        step = (bottom - top) // count
        return left, top + index * step, right, top + (index + 1) * step
    step = (right - left) // count
    return left + index * step, top, left + (index + 1) * step, bottom


def _paste(scene: Image.Image, sprite: Image.Image, rng: random.Random, *, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    edge = round(min(right - left, bottom - top) * rng.uniform(0.7, 0.98))
    scale = edge / max(sprite.size)
    small = sprite.resize((round(sprite.width * scale), round(sprite.height * scale)), Image.Resampling.BICUBIC)
    x = left + rng.randint(0, right - left - small.width)
    y = top + rng.randint(0, bottom - top - small.height)
    scene.alpha_composite(small, (x, y))
