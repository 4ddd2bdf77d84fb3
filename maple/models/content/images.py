"""Item images from a path or URI: bounded in bytes and pixels before they are decoded; what is no image is missing, not an error."""

from __future__ import annotations

import io
from pathlib import PurePosixPath
from typing import Any

from maple.artifacts import Place
from maple.errors import ConfigError

MAX_BYTES = 20 << 20
MAX_PIXELS = 50_000_000
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]


def read_image(address: str, root: str | None = None, max_pixels: int = MAX_PIXELS) -> Any | None:
    """The image as RGB, or None where there is none: nothing there, too large, torn, or of no known format.

    ``address``: a path, or a URI of any pyarrow filesystem; with ``root``, a name below it. Only the header is read before the
    size is known, so a small file that would unpack to gigabytes is never unpacked.
    """
    from PIL import Image

    try:
        data = _bytes(address, root)
        if data is None:
            return None
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels or min(image.size) < 1:
                return None
            return image.convert("RGB")
    except Exception:  # decoders raise what they like; a bad image is a missing one
        return None


def _bytes(address: str, root: str | None) -> bytes | None:
    if root is not None:
        if PurePosixPath(address).is_absolute() or ".." in PurePosixPath(address).parts or "://" in address:
            return None  # an address in the data may not leave the folder that the settings name
        place = Place.at(root) / address
    else:
        place = Place.at(address)
    with place.fs.open_input_stream(place.path) as stream:
        data = bytes(stream.read(MAX_BYTES + 1))
    return data if len(data) <= MAX_BYTES else None


def check_root(root: str | None) -> None:
    """``ConfigError`` where the folder of the images is not there."""
    if root is not None and not Place.at(root).exists():
        raise ConfigError(f"content: the folder of images {root!r} does not exist; check `root`")
