"""The images of a request: their bytes while it waits, their pixels when its turn comes. Nothing is fetched."""

import base64
import io

from PIL import Image

from alula.data.pixels import UNREADABLE
from alula.serving.limits import RequestError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is tried on the bytes of an image: formats of photographs and screenshots, not the many that PIL reads."""


def packed(content: bytes) -> Image.Image:
    """The image in `content`: PIL reads its header now, and its pixels when they are first asked for."""
    return Image.open(io.BytesIO(content), formats=FORMATS)


def read_image(url: str, *, where: str, max_pixels: int) -> tuple[bytes, int]:
    """The file in a ``data:`` URL, and how many pixels it has by its header.

    Raises:
        RequestError: 400; another kind of address, no image, or one of more than `max_pixels`.
    """

    def refused(message: str, code: str = "invalid_image") -> RequestError:
        return RequestError(400, f"{where}: {message}", code=code, param=where)

    head, comma, payload = url.partition(",")
    if not head.startswith("data:"):
        shown = url if len(url) <= 40 else f"{url[:40]}..."
        raise refused(f"'{shown}' is refused: this server fetches nothing. Send the image itself: data:image/png;base64,...")
    if not comma or not head.endswith(";base64"):
        raise refused("a data: URL must read data:image/png;base64,... . Encode the file's bytes with base64.")
    try:
        content = base64.b64decode(payload, validate=True)
        with packed(content) as found:
            width, height = found.size
    except UNREADABLE as error:
        raise refused(f"cannot be read as an image ({error}). {', '.join(FORMATS)} are accepted: send one of these.") from error
    if width * height > max_pixels:
        message = f"{width} x {height} pixels came; {max_pixels:,} are left of what one request may have. Send smaller images, or fewer."
        raise refused(message, "image_too_large")
    return content, width * height
