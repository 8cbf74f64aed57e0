"""Images however they are given, paths, encoded bytes, PIL images or arrays, as batches of RGB images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mode.data.images import UndecodableImage, decode
from mode.errors import ModeError

OneImage = str | Path | bytes | Image.Image | NDArray[np.uint8]
Images = OneImage | Sequence[OneImage] | Tensor


def rgb_batches(images: Images, batch_size: int) -> Iterator[Iterator[Image.Image]]:
    """Decode images, in batches, each when it is asked for: whoever shrinks it at once has one in memory at a time.

    Args:
        images: one image or a sequence: a path, an encoded image (bytes), a PIL image, or uint8 [height, width, 3];
            also uint8 [n, height, width, 3].
        batch_size: images in a batch, at most.

    Yields:
        Images in RGB, at least one, to be taken before the next batch.

    Raises:
        ModeError: what cannot be an image, named by its path or number.
    """
    if isinstance(images, Tensor):
        advice = "give float [n, 3, size, size], as `preprocess` makes it, or arrays"
        raise ModeError(f"images: a tensor of {images.dtype}", advice)
    if isinstance(images, np.ndarray):
        images = list(images) if images.ndim == 4 else [images]
    listed = [images] if isinstance(images, str | Path | bytes | Image.Image) else images
    for start in range(0, len(listed), batch_size):
        yield (_to_rgb(image, number) for number, image in enumerate(listed[start : start + batch_size], start))


def _to_rgb(image: OneImage, number: int) -> Image.Image:
    """Any one image as a PIL image in RGB; `number` names it in errors where it has no path."""
    where = f"image {number}"
    try:
        if isinstance(image, str | Path):
            where = str(image)
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            image = decode(image)
    except OSError as error:
        raise ModeError(f"{where}: cannot be read: {error.strerror or error}") from None
    except UndecodableImage as error:
        raise ModeError(f"{where}: cannot be decoded: {error}") from None
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            shape = f"{image.dtype} {list(image.shape)}"
            raise ModeError(f"{where}: an array of {shape}", "an image is uint8 [height, width, 3]")
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise ModeError(f"{where}: a {type(image).__name__} is no image", "give a path, bytes, a PIL image or an array")
    return image.convert("RGB")
