"""Country and continent on a map, in four languages: `maps` (English), `maps_ja`, `maps_sw`, `maps_ur`."""

import math
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image, ImageDraw

from alula.data.sample import Sample
from alula.data.stream import Task
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.drawing import Colour, encode
from alula.data.tasks.selection import answer_tokens, choose, generator
from alula.data.tasks.table import INFO, LANGUAGES, TASKS, TaskInfo

QUESTIONS = {
    "en": ("Which country is highlighted?", "On which continent is the highlighted country?"),
    "ja": ("色のついた国はどこですか？", "色のついた国はどの大陸にありますか？"),
    "sw": ("Nchi iliyotiwa rangi ni ipi?", "Nchi iliyotiwa rangi iko bara gani?"),
    "ur": ("نمایاں کیا گیا ملک کون سا ہے؟", "نمایاں کیا گیا ملک کس براعظم میں ہے؟"),
}
COPIES = {"train": 6, "test": 2}
SIDE = 112
"""Pixels."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """Colours and projection of a map. `is_mercator`: else latitudes are equally spaced."""

    sea: Colour
    land: Colour
    border: Colour
    highlights: tuple[Colour, ...]
    is_mercator: bool


STYLES = {
    "train": Style(
        sea=(190, 220, 245), land=(238, 234, 215), border=(130, 130, 120),
        highlights=((214, 40, 40), (240, 130, 20), (230, 60, 130)), is_mercator=False,
    ),
    "test": Style(
        sea=(250, 250, 250), land=(205, 208, 205), border=(255, 255, 255),
        highlights=((120, 40, 150), (20, 110, 60)), is_mercator=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outline:
    """One ring of a country: longitude-latitude points and their bounds, in degrees."""

    code: str
    points: list[tuple[float, float]]
    bounds: tuple[float, float, float, float]


def build(*, language: str, train_size: int | None, test_size: int | None, seed: int) -> Task:
    """Both questions about each crop; the continent only where there is one answer."""
    name = "maps" if language == "en" else f"maps_{language}"
    rows = read_table("maps")
    outlines = [outline for row in rows for outline in _outlines(row)]
    splits = {}
    for split, size in (("train", train_size), ("test", test_size)):
        asked = [
            (row["code"], copy, question, row[column])
            for row in rows
            if row["is_asked"]
            for copy in range(COPIES[split])
            for question, column in zip(QUESTIONS[language], (language, f"continent_{language}"), strict=True)
            if row[column]
        ]
        samples = []
        for code, copy, question, answer in choose(asked, size=size, seed=seed, name=f"{name}/{split}"):
            key = f"{split}/{code}/{copy}"
            picture = _draw(code, outlines, STYLES[split], generator("maps", key, seed))
            kind = QUESTIONS[language].index(question)
            samples.append(
                Sample.ask(question, answer, images=(encode(picture),), id=f"{name}/{key}/{kind}", origin=name, language=language)
            )
        splits[split] = samples
    tokens = answer_tokens(splits["train"] + splits["test"])
    return Task(name=name, train=splits["train"], test=splits["test"], max_new_tokens=tokens, description=str(INFO[name]))


def _outlines(row: dict[str, Any]) -> list[Outline]:
    """The rings, and those near the date line a second time, 360 degrees away: a crop may look from either side."""
    outlines = []
    for flat in row["rings"]:
        points = list(zip(flat[::2], flat[1::2], strict=True))
        for turn in (-360, 0, 360):
            turned = [(longitude + turn, latitude) for longitude, latitude in points]
            west, east = min(turned)[0], max(turned)[0]
            if east > -230 and west < 230:
                latitudes = flat[1::2]
                outlines.append(Outline(code=row["code"], points=turned, bounds=(west, min(latitudes), east, max(latitudes))))
    return outlines


def _draw(code: str, outlines: list[Outline], style: Style, rng: random.Random) -> Image.Image:
    """A crop around the largest ring of the country, drawn in the middle part of the world."""
    own = [outline for outline in outlines if outline.code == code and -180 <= _middle(outline)[0] < 190]
    largest = max(own, key=lambda outline: outline.bounds[2] - outline.bounds[0] + outline.bounds[3] - outline.bounds[1])
    longitude, latitude = _middle(largest)
    squash = math.cos(math.radians(latitude))
    west, south, east, north = largest.bounds
    half = max((east - west) / 2 * squash, (north - south) / 2) * rng.uniform(1.15, 2.4)
    half = max(half, 5.0)
    longitude += rng.uniform(-0.2, 0.2) * half / squash
    latitude += rng.uniform(-0.2, 0.2) * half
    height = _mercator if style.is_mercator else _plain
    centre = height(latitude)
    # Degrees on the map's vertical axis: Mercator stretches by 1 / cos(latitude).
    reach = half / squash if style.is_mercator else half
    scale_x, scale_y = SIDE / (2 * half / squash), SIDE / (2 * reach)
    image = Image.new("RGB", (SIDE, SIDE), style.sea)
    draw = ImageDraw.Draw(image)
    highlight = rng.choice(style.highlights)
    for outline in outlines:
        left, right = ((edge - longitude) * scale_x + SIDE / 2 for edge in (outline.bounds[0], outline.bounds[2]))
        low, high = (SIDE / 2 - (height(edge) - centre) * scale_y for edge in (outline.bounds[1], outline.bounds[3]))
        if right > 0 and left < SIDE and low > 0 and high < SIDE:
            line = [((x - longitude) * scale_x + SIDE / 2, SIDE / 2 - (height(y) - centre) * scale_y) for x, y in outline.points]
            draw.polygon(line, fill=highlight if outline.code == code else style.land, outline=style.border)
    return image


def _middle(outline: Outline) -> tuple[float, float]:
    west, south, east, north = outline.bounds
    return (west + east) / 2, (south + north) / 2


def _plain(latitude: float) -> float:
    return latitude


def _mercator(latitude: float) -> float:
    """Mercator's height in degrees of the equator; cut at 84 degrees, where it runs away."""
    cut = math.radians(max(-84.0, min(84.0, latitude)))
    return math.degrees(math.asinh(math.tan(cut)))


for _language in LANGUAGES:
    _name = "maps" if _language == "en" else f"maps_{_language}"
    INFO.register(_name)(
        TaskInfo(
            summary="Which of 160 countries is highlighted on a map, and on which continent it is.",
            languages=(_language,),
            licence="public-domain outlines (ISC package), Unicode-3.0 names, MIT facts",
            blind=0.16,
            held_out="other crops, colours and projection (Mercator); the countries are those of train",
        )
    )
    TASKS.register(_name)(partial(build, language=_language))
