"""Training images as a whole and in part: what a router of images is calibrated on, as one of words is on captions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mode.data.images import UndecodableImage, decode
from mode.data.shards.index import PairIndex
from mode.data.shards.reading import ImageFiles
from mode.embedding.open_clip import OpenClipEmbedder
from mode.ensemble.rules import KEPT_WORDS
from mode.errors import ModeError
from mode.permutation import permuted

#: Share of an image's area in its part: as incomplete as the captions that a router of words is calibrated on.
KEPT_AREA = KEPT_WORDS


def image_views(
    embedder: OpenClipEmbedder, index: PairIndex, root: Path, count: int, random_seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Vectors of images of an index, as a whole and of a part of each: a random rectangle of the same proportions.

    Args:
        embedder: its image tower and preprocessing.
        index: where the images lie.
        root: folder that relative paths of the index start from.
        count: images to draw, at most.
        random_seed: of the images and of their parts.

    Returns:
        (whole, partial), unit rows, float32 [n, d] each, of those that can be decoded.

    Raises:
        ModeError: a file is not the one that was indexed, or no image can be decoded.
    """
    random = np.random.default_rng(random_seed)
    images = permuted(np.arange(min(count, index.images)), index.images, random_seed)
    rows = index.first[np.sort(images)]
    pairs = _views(embedder, ImageFiles(index, root), rows, random)
    whole, partial = [], []
    while batch := list(islice(pairs, embedder.batch_size)):
        whole.append(embedder.encode_images(torch.stack([one for one, _ in batch])))
        partial.append(embedder.encode_images(torch.stack([part for _, part in batch])))
    if not whole:
        raise ModeError(f"routing: none of {len(rows)} training images can be decoded", "see the index's quarantine")
    return np.concatenate(whole), np.concatenate(partial)


def part_of(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    """A random part of a picture: both sides times the root of `KEPT_AREA`, at least one pixel, anywhere in it."""
    width, height = (max(1, round(side * KEPT_AREA**0.5)) for side in picture.size)
    left = int(random.integers(picture.width - width + 1))
    top = int(random.integers(picture.height - height + 1))
    return picture.crop((left, top, left + width, top + height))


def _views(
    embedder: OpenClipEmbedder, files: ImageFiles, rows: NDArray[np.int64], random: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels of each image and of its part; what cannot be read or decoded is passed over."""
    for content in files.read_many(rows.tolist()):
        try:
            if isinstance(content, OSError):
                continue
            picture = decode(content).convert("RGB")
        except UndecodableImage:
            continue
        yield embedder.preprocess.pixels(picture), embedder.preprocess.pixels(part_of(picture, random))
