"""Pictures as models read them: upright, in RGB, with eight bits a channel. It knows no row and no file."""

import struct

from PIL import ExifTags, Image

UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What PIL raises on bytes that are no whole picture."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture is turned upright, by its EXIF orientation."""


def as_rgb(image: Image.Image) -> Image.Image:
    """`image` as a viewer shows it: turned as its EXIF block says, 16 bits of grey scaled to 8, which PIL alone makes white.

    Not by ``ImageOps.exif_transpose``: it writes the whole EXIF block again, and fails on many that cameras wrote.
    """
    is_deep = image.mode.startswith("I")
    rgb = (image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L") if is_deep else image).convert("RGB")
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except UNREADABLE:  # the pixels could be read: a damaged EXIF block just tells no orientation
        turn = None
    return rgb if turn is None else rgb.transpose(turn)
