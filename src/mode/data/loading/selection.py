"""Which pairs a model is trained on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mode.errors import ModeError

#: Keeps the draw of `held_out_images` apart from other draws with the same seed.
_HELD_OUT = 1_000_003


def expert_rows(coarse: NDArray[np.int32], cluster: int, outside_share: float, random_seed: int) -> NDArray[np.int64]:
    """The pairs of one cluster and a few of the others (MoDE paper, section 4.1: "slightly better than 0").

    Args:
        coarse: coarse cluster of every pair, int32 [pairs].
        cluster: the expert's own.
        outside_share: share of the pairs *outside* the cluster that are added, rounded to the nearest whole number.
        random_seed: of the sample; clusters draw independently of one another.

    Returns:
        Rows, int64, ascending, each once.

    Raises:
        ModeError: no pair belongs to the cluster.

    Example:
        >>> expert_rows(np.array([0, 1, 0, 1], dtype=np.int32), cluster=1, outside_share=0.0, random_seed=0)
        array([1, 3])
    """
    own = np.flatnonzero(coarse == cluster)
    if not len(own):
        raise ModeError(f"cluster {cluster} has no pairs to train an expert on", "choose a smaller clustering.coarse")
    outside = np.flatnonzero(coarse != cluster)
    count = round(outside_share * len(outside))
    drawn = np.random.default_rng([random_seed, cluster]).choice(outside, size=count, replace=False, shuffle=False)
    return np.sort(np.concatenate([own, drawn])).astype(np.int64)


def held_out_images(images: int, count: int, random_seed: int) -> NDArray[np.bool_]:
    """The images whose pairs no model is trained on, with all their captions.

    Args:
        images: of the source.
        count: how many are held out.
        random_seed: the same numbers give the same images.

    Returns:
        bool [images], `count` of them true.

    Raises:
        ModeError: nothing would be left to train on.

    Example:
        >>> held_out_images(10, 3, random_seed=0).sum()
        np.int64(3)
    """
    if count >= images:
        raise ModeError(f"training.held_out: {count} of {images} images", "leave some to train on")
    mask = np.zeros(images, bool)
    random = np.random.default_rng([random_seed, _HELD_OUT])
    mask[random.choice(images, size=count, replace=False, shuffle=False)] = True
    return mask


def held_out_pairs(
    rows: NDArray[np.int64], image: NDArray[np.int64], held_out: int, count: int, random_seed: int
) -> NDArray[np.int64]:
    """Those pairs that `without_held_out` leaves out: one of each image, and so many of them in a random order.

    Args:
        rows, image, held_out, random_seed: as in `without_held_out`.
        count: of pairs, at most.

    Example:
        >>> held_out_pairs(np.array([0, 1, 2]), np.array([0, 0, 1]), held_out=1, count=5, random_seed=0).size
        1
    """
    left = rows[held_out_images(int(image.max()) + 1, held_out, random_seed)[image[rows]]]
    first = left[np.sort(np.unique(image[left], return_index=True)[1])]
    return np.random.default_rng([random_seed, _HELD_OUT + 1]).permutation(first)[:count]


def without_held_out(
    rows: NDArray[np.int64], image: NDArray[np.int64], count: int, random_seed: int
) -> NDArray[np.int64]:
    """Those pairs whose image is not held out.

    Args:
        rows: pairs, rows of the index, int64.
        image: number of the image of every pair of the source, int64 [pairs of the source].
        count, random_seed: as in `held_out_images`.

    Returns:
        int64, in the same order.

    Example:
        >>> without_held_out(np.array([0, 1, 2]), np.array([0, 0, 1]), count=0, random_seed=0)
        array([0, 1, 2])
    """
    if not count:
        return rows
    left: NDArray[np.int64] = rows[~held_out_images(int(image.max()) + 1, count, random_seed)[image[rows]]]
    return left
