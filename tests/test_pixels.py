"""Claims about pictures: what a model sees is what a viewer shows."""

import io

import pytest
from PIL import ExifTags, Image, ImageOps

from alula.data import Sample
from alula.serving.images import packed, read_image
from data_files import data_uri


def photo(orientation: int, *, format: str = "PNG", exif: bytes | None = None) -> bytes:
    """40 x 20 pixels as a camera stores them, whose top left quarter is white."""
    picture, noted, out = Image.new("RGB", (40, 20)), Image.Exif(), io.BytesIO()
    picture.paste((255, 255, 255), (0, 0, 20, 10))
    noted[ExifTags.Base.Orientation] = orientation
    picture.save(out, format, exif=noted.tobytes() if exif is None else exif)
    return out.getvalue()


def seen(image: bytes | Image.Image) -> Image.Image:
    return Sample.ask("what?", "red", images=(image,)).open_images()[0]


@pytest.mark.parametrize("orientation", range(1, 10))  # 9 means nothing
def test_a_photo_is_upright_wherever_it_is_opened(orientation: int) -> None:
    stored = photo(orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    sent, _ = read_image(data_uri(stored), where="messages.0", max_pixels=1000)
    for image in (seen(stored), seen(Image.open(io.BytesIO(stored))), seen(packed(sent))):
        assert (image.size, image.tobytes()) == (upright.size, upright.tobytes())
    assert seen(upright).tobytes() == upright.tobytes()  # not turned twice
    assert upright.size == ((20, 40) if orientation in (5, 6, 7, 8) else (40, 20))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "TIFF"])
def test_other_formats_of_photos_are_upright_too(format: str) -> None:
    assert seen(photo(6, format=format)).size == (20, 40)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0nothing", b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12"])
def test_a_damaged_note_on_a_photo_leaves_it_as_it_is_stored(exif: bytes) -> None:
    assert seen(photo(1, exif=exif)).tobytes() == seen(photo(1)).tobytes()


@pytest.mark.parametrize(("value", "grey"), [(0, 0), (257, 1), (40000, 156), (65535, 255)])
def test_sixteen_bits_of_grey_are_scaled_and_not_cut(value: int, grey: int) -> None:
    out = io.BytesIO()
    Image.new("I;16", (2, 2), value).save(out, "PNG")
    assert seen(out.getvalue()).getpixel((1, 1)) == (grey, grey, grey)
