"""What training does to images: random crops of one; flips, shifts and other colours of a whole batch."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from mode.data.images import to_array
from mode.data.loading.colour import change_colours
from mode.params import ImageParams
from mode.permutation import hash_numbers

#: Width by height of a random crop, and how often one is drawn that fits, as torchvision's RandomResizedCrop has it.
_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10

# Independent uses of the random numbers of one sample position.
_FLIP, _SHIFT_X, _SHIFT_Y, _CROP = range(4)


def random_crop(
    picture: Image.Image,
    size: int,
    least: float,
    random_seed: int,
    position: int,
    aspect: tuple[float, float] = _ASPECT,
) -> np.ndarray:
    """Cut a random part out of an image and resize it, as torchvision's RandomResizedCrop (bicubic) does.

    Args:
        picture: any mode.
        size: pixels a side of the result.
        least: smallest share of the area, 0 to 1.
        random_seed, position: decide the part: the sample at a position is cut alike whenever it is read.
        aspect: its width by height, at least and at most.

    Returns:
        uint8 [3, size, size].
    """
    box = random_box(picture.size, least, random_seed, position, aspect)
    return to_array(picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box))


def random_box(
    extent: tuple[int, int], least: float, random_seed: int, position: int, aspect: tuple[float, float] = _ASPECT
) -> tuple[int, int, int, int]:
    """The part that `random_crop` takes of an image of `extent` (width, height): left, top, right, bottom."""
    numbers = hash_numbers(np.arange(4 * _TRIES), random_seed, _CROP, position) / 2.0**64
    width, height = extent
    low, high = np.log(aspect)
    for area_draw, aspect_draw, x_draw, y_draw in numbers.reshape(_TRIES, 4):
        area = width * height * (least + (1 - least) * area_draw)
        shape = np.exp(low + (high - low) * aspect_draw)
        w, h = round(np.sqrt(area * shape)), round(np.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x_draw * (width - w + 1)), int(y_draw * (height - h + 1))
            return left, top, left + w, top + h
    # Nothing fits a very long image: its middle, as near to the allowed shapes as it goes.
    w, h = max(1, min(width, round(height * aspect[1]))), max(1, min(height, round(width / aspect[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def augment_batch(images: torch.Tensor, image: ImageParams, *, random_seed: int, positions: np.ndarray) -> torch.Tensor:
    """Flip half of the images, shift each at random with its edges repeated, and change colours, as `image` says.

    Args:
        images: uint8 [batch, 3, size, size], on any device.
        image: what to do.
        random_seed: of the training.
        positions: int64 [batch], sample position of each image (`Batch.positions`). What happens to an image depends
            on its position only, not on how batches are cut or spread over processes.

    Returns:
        uint8 [batch, 3, size, size] on the same device; `images` itself if there is nothing to do.
    """
    if len(images) and (image.flip or image.shift):
        images = _move(images, image, random_seed, positions)
    if len(images) and (image.color_jitter is not None or image.gray_scale_prob):
        images = change_colours(images, image, random_seed=random_seed, positions=positions)
    return images


def _move(images: torch.Tensor, image: ImageParams, random_seed: int, positions: np.ndarray) -> torch.Tensor:
    count, _, height, width = images.shape
    span = np.uint64(2 * image.shift + 1)
    shift_x = (hash_numbers(positions, random_seed, _SHIFT_X) % span).astype(np.int64) - image.shift
    shift_y = (hash_numbers(positions, random_seed, _SHIFT_Y) % span).astype(np.int64) - image.shift
    x = np.clip(np.arange(width) + shift_x[:, None], 0, width - 1)
    y = np.clip(np.arange(height) + shift_y[:, None], 0, height - 1)
    if image.flip:
        flipped = hash_numbers(positions, random_seed, _FLIP) % np.uint64(2) == 1
        x[flipped] = x[flipped, ::-1]
    # One index per pixel of the plane, shared by the channels.
    plane = torch.from_numpy(y[:, :, None] * width + x[:, None, :]).reshape(count, 1, -1).to(images.device)
    return images.flatten(2).gather(2, plane.expand(-1, images.shape[1], -1)).view_as(images)
