"""Small pictures: encoding, colours, and sprites put on a ground. It knows no task."""

import io
import random

from PIL import Image

Colour = tuple[int, int, int]


def encode(image: Image.Image) -> bytes:
    """PNG bytes of an RGB picture; the lightest compression, since they are held in memory only."""
    out = io.BytesIO()
    image.convert("RGB").save(out, format="PNG", compress_level=1)
    return out.getvalue()


def decode(content: bytes) -> Image.Image:
    """The picture with its transparency."""
    return Image.open(io.BytesIO(content)).convert("RGBA")


def random_colour(rng: random.Random, *, low: int, high: int) -> Colour:
    """A colour with each channel between `low` and `high` (0-255)."""
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def place(sprite: Image.Image, *, side: int, rng: random.Random, smallest: float = 0.6, flip: bool = True) -> Image.Image:
    """The sprite on a light square ground, at a random place and size, perhaps mirrored.

    Args:
        side: pixels of the square.
        smallest: the least share of the side that the sprite's longer edge takes; the most is 0.95.
    """
    scale = side * rng.uniform(smallest, 0.95) / max(sprite.size)
    width, height = (max(1, round(edge * scale)) for edge in sprite.size)
    small = sprite.resize((width, height), Image.Resampling.BICUBIC)
    if flip and rng.random() < 0.5:
        small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    ground = Image.new("RGBA", (side, side), (*random_colour(rng, low=205, high=255), 255))
    ground.alpha_composite(small, (rng.randint(0, side - width), rng.randint(0, side - height)))
    return ground
