"""Drawn things on a grid of nine cells: a picture, and where each thing is. It knows no question."""

import random
from collections.abc import Sequence

from PIL import Image

from alula.data.boxes import Box
from alula.data.tasks.asset_table import read_table
from alula.data.tasks.drawing import decode, random_colour

SIDE, CELL = 126, 42
"""Pixels of the picture and of a cell."""
VISIBLE = 128
"""The least opacity (0-255) of a pixel that counts as part of a thing."""

Sprites = dict[str, list[tuple[Image.Image, str, str]]]
"""Vendor -> (picture, name, plural)."""


def read_sprites(split: str) -> Sprites:
    """The things that can be counted, as the vendors of a split draw them."""
    sprites: Sprites = {}
    for row in read_table("emoji"):
        if row["plural"] and row["split"] == split:
            sprites.setdefault(row["vendor"], []).append((decode(row["image"]), row["en"], row["plural"]))
    return sprites


def draw_scene(pictures: Sequence[Image.Image], cells: Sequence[int], rng: random.Random) -> tuple[Image.Image, list[Box]]:
    """Each picture at a random size and place within its cell (0-8, row by row), on a light ground; and the box of what is seen of each."""
    scene = Image.new("RGBA", (SIDE, SIDE), (*random_colour(rng, low=205, high=255), 255))
    boxes = []
    for picture, cell in zip(pictures, cells, strict=True):
        edge = rng.randint(32, 40)
        small = picture.resize((edge, edge * picture.height // picture.width), Image.Resampling.BICUBIC)
        small.thumbnail((edge, edge))
        x = cell % 3 * CELL + rng.randint(0, CELL - small.width)
        y = cell // 3 * CELL + rng.randint(0, CELL - small.height)
        scene.alpha_composite(small, (x, y))
        seen = small.getchannel("A").point(lambda opacity: 255 if opacity >= VISIBLE else 0).getbbox()
        assert seen is not None, "a sprite without a visible pixel"
        left, top, right, bottom = seen
        boxes.append(Box((x + left) / SIDE, (y + top) / SIDE, (x + right) / SIDE, (y + bottom) / SIDE))
    return scene, boxes
