"""Encoded images to pixels, exactly as open_clip's inference transform does it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from mode.errors import in_one_line

if TYPE_CHECKING:
    from torch import Tensor

# Corrupt metadata and large images below the limit: pixels are all that counts. Set once, since switching filters for
# each image would cost a fifth of a small one's decoding and is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


#: What is decoded. Pillow knows fifty formats more, some of which start other programs (an EPS named .jpg does).
FORMATS = ("JPEG", "PNG", "WEBP")
#: Longer side by shorter. Resizing makes the shorter side as long as the model's, so that memory grows with this: 23 MB
#: at 336 pixels. Of 1 x 20,000 pixels, 157 bytes of PNG, it would be 9 GB. Web images beyond are lines and borders.
MAX_ASPECT = 50
#: Pixels, as the served ensemble has it. A WebP of 34 bytes can have as many, and takes 16 bytes for each: 800 MB.
MAX_PIXELS = 50_000_000
#: Passes over a JPEG's pixels (progressive ones have about ten): each costs a few bytes, but time by the pixels, and is
#: counted where these are more than so many.
_MAX_SCANS, _MANY_PIXELS = 200, 2**18
_END_OF_FILE = {b"\xff\xd8": b"\xff\xd9", b"\x89P": b"IEND\xaeB`\x82"}


class UndecodableImage(Exception):
    """These bytes are no image that can be read to its end."""


def open_image(content: bytes) -> Image.Image:
    """An image of one of `FORMATS` whose header is read, and whose pixels are not yet decoded.

    Raises:
        UndecodableImage: not an image, or of a size or shape that must be an attack: more than `MAX_PIXELS`, or longer
            than `MAX_ASPECT` times its shorter side.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:  # its message names an address in memory
        raise UndecodableImage(f"none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's plugins raise whatever their parser runs into
        raise _undecodable(error) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UndecodableImage(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UndecodableImage(f"{width} x {height} pixels, longer than {MAX_ASPECT} times the shorter side")
    if width * height > _MANY_PIXELS and content.startswith(b"\xff\xd8") and _scans(content) > _MAX_SCANS:
        raise UndecodableImage(f"more than {_MAX_SCANS} scans")
    return image


def _scans(content: bytes) -> int:
    """How often a JPEG has the marker FF DA; compared two bytes at a time, `bytes.count` takes ten times as long."""
    return sum(
        int(np.count_nonzero(np.frombuffer(content, "<u2", (len(content) - first) // 2, first) == 0xDAFF))
        for first in (0, 1)
    )


def decode(content: bytes) -> Image.Image:
    """Decode all pixels of a JPEG, PNG or WebP; the mode (RGB, L, P ...) is the file's.

    Raises:
        UndecodableImage: as `open_image`, or cut off or damaged inside, or in colours that cannot be made RGB.
    """
    image = open_image(content)
    try:
        image.load()
        if image.mode not in ("RGB", "L"):
            image.crop((0, 0, 1, 1)).convert("RGB")
    except Exception as error:  # as above
        raise _undecodable(error) from None
    return image


def _undecodable(error: Exception) -> UndecodableImage:
    return UndecodableImage(in_one_line(error))


def is_complete(content: bytes) -> bool:
    """Whether an encoded image ends as its format does; a WebP ends anyhow."""
    return content.endswith(_END_OF_FILE.get(content[:2], b""))


def resize_and_crop(image: Image.Image, size: int) -> np.ndarray:
    """Shorter side to `size` (bicubic), centre square cut out, RGB: open_clip's order, which matters for palettes.

    Returns:
        uint8 [3, size, size].
    """
    width, height = image.size
    shorter = min(width, height)
    if shorter != size:
        width, height = int(size * width / shorter), int(size * height / shorter)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    if width != height:
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    return to_array(image)


def to_array(image: Image.Image) -> np.ndarray:
    """RGB pixels as uint8 [3, height, width]."""
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(value / 255 - mean) / std per channel, bit by bit as open_clip's transform computes it.

    Args:
        pixels: uint8 [batch, 3, height, width].
        mean, std: of each channel.

    Returns:
        float32 of the same shape, on the same device.
    """
    values = pixels.float()
    return values.div_(255).sub_(values.new_tensor(mean).view(-1, 1, 1)).div_(values.new_tensor(std).view(-1, 1, 1))


def to_png(pixels: np.ndarray) -> bytes:
    """uint8 [3, height, width] as an encoded image."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(stream, "png")
    return stream.getvalue()
