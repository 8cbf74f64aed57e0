"""Encoded images to pixels, exactly as open_clip's inference transform does it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

# Corrupt metadata and large images below the limit: pixels are all that counts. Set once, since switching filters for
# each image would cost a fifth of a small one's decoding and is not safe among threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UndecodableImage(Exception):
    """These bytes are no image that can be read to its end."""


def decode(content: bytes) -> Image.Image:
    """Decode all pixels of a JPEG, PNG, WebP or whatever Pillow reads; the mode (RGB, L, P ...) is the file's.

    Raises:
        UndecodableImage: not an image, cut off, or so large that it must be an attack (Pillow's limit).
    """
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except UnidentifiedImageError:  # its message names an address in memory
        raise UndecodableImage("no image format that Pillow knows") from None
    except Exception as error:  # Pillow's plugins raise whatever their parser runs into
        raise UndecodableImage(" ".join(str(error).split()) or type(error).__name__) from None
    return image


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
