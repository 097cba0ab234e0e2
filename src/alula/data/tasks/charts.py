"""Bar charts of Gapminder's numbers."""

import random
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.drawing import Colour, encode
from alula.data.tasks.selection import answer_tokens, generator
from alula.data.tasks.table import INFO, TASKS, TaskInfo

NAME = "charts"
SIZES = {"train": 3000, "test": 500}
SIDE = 144
"""Pixels."""
TEST_YEARS = (1997, 2002, 2007)
INDICATORS = ("life expectancy", "income", "population")
COLOURS: dict[str, Colour] = {
    "blue": (31, 90, 200),
    "orange": (255, 140, 20),
    "green": (40, 150, 50),
    "red": (214, 35, 40),
    "purple": (140, 60, 180),
    "black": (30, 30, 30),
}
INFO.register(NAME)(
    TaskInfo(
        summary="Which bar is longest or shortest, of which colour, how many bars there are.",
        languages=("en",),
        licence="BSD-3-Clause package, Gapminder data CC-BY",
        blind=0.15,
        held_out="numbers of the years 1997 to 2007, train has 1952 to 1992",
    )
)

Bar = tuple[str, float, str]
"""Country code, value, colour name."""


@TASKS.register(NAME)
def build(*, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """Charts drawn anew for each seed."""
    rows = read_table(NAME)
    splits = {}
    for split, size in (("train", train_size), ("test", test_size)):
        years: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            if (row["year"] in TEST_YEARS) == (split == "test"):
                years.setdefault(row["year"], []).append(row)
        count = SIZES[split] if size is None else min(size, SIZES[split])
        splits[split] = [_sample(years, split, index, generator(NAME, split, seed, index)) for index in range(count)]
    tokens = answer_tokens(splits["train"] + splits["test"])
    return Task(name=NAME, train=splits["train"], test=splits["test"], max_new_tokens=tokens, description=str(INFO[NAME]))


def _sample(years: dict[int, list[dict[str, Any]]], split: str, index: int, rng: random.Random) -> Sample:
    bars = _bars(years, rng)
    largest, smallest = max(bars, key=lambda bar: bar[1]), min(bars, key=lambda bar: bar[1])
    one = rng.choice(bars)
    picture = _draw_standing(bars) if rng.random() < 0.5 else _draw_lying(bars)
    question, answer = (
        ("What color is the longest bar?", largest[2]),
        ("What color is the shortest bar?", smallest[2]),
        ("Which country has the longest bar?", largest[0]),
        (f"What color is the bar of {one[0]}?", one[2]),
        ("How many bars are there?", str(len(bars))),
    )[index % 5]
    return Sample.ask(question, answer, images=(encode(picture),), id=f"{NAME}/{split}/{index}", origin=NAME)


def _bars(years: dict[int, list[dict[str, Any]]], rng: random.Random) -> list[Bar]:
    """Two to five countries of one year whose longest and shortest bars stand out by a tenth."""
    count = rng.randint(2, 5)
    while True:
        indicator = rng.choice(INDICATORS)
        chosen = rng.sample(years[rng.choice(sorted(years))], count)
        values = sorted(row[indicator] for row in chosen)
        if values[-1] >= 1.1 * values[-2] and values[0] <= 0.9 * values[1] and values[0] >= 0.04 * values[-1]:
            colours = rng.sample(sorted(COLOURS), count)
            return [(row["code"], row[indicator], colour) for row, colour in zip(chosen, colours, strict=True)]


def _draw_standing(bars: list[Bar]) -> Image.Image:
    image, draw, font, top = _canvas(bars)
    step = (SIDE - 8) // len(bars)
    for index, (code, value, colour) in enumerate(bars):
        left, width = 6 + index * step, min(step - 6, 30)
        draw.rectangle((left, SIDE - 18 - 118 * value / top, left + width, SIDE - 18), fill=COLOURS[colour])
        draw.text((left, SIDE - 15), code, font=font, fill="black")
    return image


def _draw_lying(bars: list[Bar]) -> Image.Image:
    image, draw, font, top = _canvas(bars)
    step = (SIDE - 8) // len(bars)
    for index, (code, value, colour) in enumerate(bars):
        upper, height = 6 + index * step, min(step - 6, 30)
        draw.rectangle((34, upper, 34 + 104 * value / top, upper + height), fill=COLOURS[colour])
        draw.text((4, upper + height // 2 - 6), code, font=font, fill="black")
    return image


def _canvas(bars: list[Bar]) -> tuple[Image.Image, ImageDraw.ImageDraw, Any, float]:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    return image, ImageDraw.Draw(image), ImageFont.load_default(size=12), max(value for _, value, _ in bars)
