"""Renders SVG and packs small pictures."""

import io

import resvg_py
from PIL import Image


def render_svg(text: str, *, width: int) -> Image.Image:
    """The drawing at `width` pixels, with transparency."""
    content = bytes(resvg_py.svg_to_bytes(svg_string=text, width=width))
    return Image.open(io.BytesIO(content)).convert("RGBA")


def fit(image: Image.Image, *, side: int) -> Image.Image:
    """The picture shrunk, if needed, to fit a square of `side` pixels."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def pack_sprite(image: Image.Image) -> bytes:
    """WebP bytes, lossless in colour count of 64 and with transparency."""
    reduced = image.quantize(64, method=Image.Quantize.FASTOCTREE).convert("RGBA")
    return _save(reduced, "WEBP", lossless=True, quality=100, method=6)


def pack_flat(image: Image.Image, *, colours: int = 16) -> bytes:
    """Palette PNG bytes of an opaque picture."""
    return _save(image.convert("RGB").quantize(colours, dither=Image.Dither.NONE), "PNG", optimize=True)


def pack_grey(image: Image.Image) -> bytes:
    """PNG bytes of a grey picture reduced to 16 levels."""
    levels = image.convert("L").point(lambda value: value // 16)
    reduced = Image.frombytes("P", levels.size, levels.tobytes())
    reduced.putpalette([value for level in range(16) for value in (level * 17,) * 3])
    return _save(reduced, "PNG", optimize=True, bits=4)


def _save(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()
