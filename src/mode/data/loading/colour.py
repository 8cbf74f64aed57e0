"""Colours of training images changed at random, as open_clip does with torchvision's ColorJitter and Grayscale.

torchvision's functions take one strength for a whole batch; called image by image, a GPU would wait for a hundred small
kernels each. Here every image of a batch has its own strength. Bytes between two changes are cut off, as there.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mode.params import ImageParams
from mode.permutation import hash_numbers

#: Keeps these draws apart from those of crops, flips and shifts.
_COLOUR = 4
#: What is drawn for a sample position; behind these, the strength of each of `_CHANGES`.
_JITTER, _ORDER, _GREY, _STRENGTH = range(4)

_ORDERS = np.array(list(permutations(range(4))))


def change_colours(images: Tensor, image: ImageParams, *, random_seed: int, positions: NDArray[np.int64]) -> Tensor:
    """Jitter brightness, contrast, saturation and hue of some images, in any order, then make some grey.

    Args:
        images: uint8 [batch, 3, height, width], on any device.
        image: `color_jitter`, `color_jitter_prob`, `gray_scale_prob`.
        random_seed, positions: as in `augment_batch`: what happens to an image depends on its position only.

    Returns:
        uint8 of the same shape and device.
    """
    device = images.device

    def drawn(use: int) -> NDArray[np.uint64]:
        return hash_numbers(positions, random_seed, _COLOUR, use)

    def uniform(use: int) -> NDArray[np.float64]:
        values: NDArray[np.float64] = drawn(use) / 2.0**64
        return values

    if image.color_jitter is not None:
        jittered = uniform(_JITTER) < image.color_jitter_prob
        order = _ORDERS[(drawn(_ORDER) % np.uint64(len(_ORDERS))).astype(np.int64)]
        images = images.clone()
        for place in range(4):
            for number, strongest in enumerate(image.color_jitter):
                mine = np.flatnonzero(jittered & (order[:, place] == number))
                if not strongest or not len(mine):
                    continue
                change, usual = _CHANGES[number], _UNCHANGED[number]
                least, most = usual - strongest, usual + strongest
                least = max(least, 0.0) if usual else least
                strength = torch.from_numpy(least + (most - least) * uniform(_STRENGTH + number)[mine])
                chosen = torch.from_numpy(mine).to(device)
                images[chosen] = change(images[chosen], strength.view(-1, 1, 1, 1).to(device))
    if image.gray_scale_prob:
        grey = torch.from_numpy(uniform(_GREY) < image.gray_scale_prob).to(device)
        images = torch.where(grey.view(-1, 1, 1, 1), _grey(images).to(torch.uint8), images)
    return images


def _grey(images: Tensor) -> Tensor:
    """Luma (ITU-R 601-2), whole numbers below it; float [batch, 1, height, width]."""
    red, green, blue = images.float().chunk(3, dim=1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor()


def _blend(images: Tensor, others: Tensor | float, strength: Tensor) -> Tensor:
    """Between the others (0) and the images (1), or beyond these."""
    mixed = images * strength.float() + others * (1 - strength).float()
    return mixed.clamp(0, 255).to(torch.uint8)


def _change_brightness(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(images, 0.0, strength)


def _change_contrast(images: Tensor, strength: Tensor) -> Tensor:
    # In whole numbers and doubles: the same mean in whatever order it is summed up.
    mean = _grey(images).long().double().mean(dim=(1, 2, 3), keepdim=True)
    return _blend(images, mean.float(), strength)


def _change_saturation(images: Tensor, strength: Tensor) -> Tensor:
    return _blend(images, _grey(images), strength)


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Hue, as a circle of length 1, moved by `turn`; saturation and value in HSV stay."""
    pixels = images.float() / 255
    red, green, blue = pixels.chunk(3, dim=1)
    value = pixels.amax(dim=1, keepdim=True)
    chroma = value - pixels.amin(dim=1, keepdim=True)
    divisor = torch.where(chroma > 0, chroma, 1.0)
    # In sixths of the circle, from red.
    hue = torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
    hue = torch.where(value == red, (green - blue) / divisor, hue) + (6 * turn).float()
    # A channel has the full value within a sixth of its own hue, and falls to value - chroma in the next sixth:
    # https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative
    away = (hue + torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)).remainder(6)
    turned = value - chroma * torch.minimum(away, 4 - away).clamp(0, 1)
    return (turned * 255.999).to(torch.uint8)


#: In the order of `color_jitter`, each with the strength at which it changes nothing.
_CHANGES = (_change_brightness, _change_contrast, _change_saturation, _turn_hue)
_UNCHANGED = (1.0, 1.0, 1.0, 0.0)
