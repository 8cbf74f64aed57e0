"""Pairs to vectors of their images, or of caption and image together: what `embed_index` takes for such a view.

Images are read and prepared exactly as evaluation prepares those of a task, so that the two can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from mode.checksums import identity_of
from mode.data.images import decode
from mode.data.shards.index import PairIndex
from mode.data.shards.reading import ImageFiles
from mode.embedding.base import HALF, StoredEmbedder
from mode.errors import ModeError
from mode.parallel import in_order

if TYPE_CHECKING:
    from mode.clip.preprocess import Preprocess
    from mode.embedding.open_clip import OpenClipEmbedder

#: Pairs that are embedded, written and recorded as done together: minutes of work, where a block of captions is one.
BLOCK = 8_192


@dataclass(frozen=True)
class PairEncoder:
    """Encodes blocks of pairs, wherever this small object is sent to: embedder and index are opened there, once.

    Attributes:
        stored: the embedder, whose view is `image` or `both`.
        index: folder of the source's index.
        root: folder that relative paths of the index start from.
        content: `identity_of` the index, without which a worker would not notice that it has another one.
        threads: that decode images.
    """

    stored: StoredEmbedder
    index: Path
    root: Path
    content: str | None
    threads: int = 1

    def __call__(self, block: tuple[int, list[str]]) -> np.ndarray:
        """float16 [pairs, dimensions] of (row of the first pair, captions); of a bad image the numbers are 0."""
        first, captions = block
        embedder, (index, files) = cast("OpenClipEmbedder", self.stored.open()), self._open_index()
        images = encode_images(embedder, index, files, first, first + len(captions), self.threads)
        if self.stored.view == "both":
            images = np.hstack([HALF * embedder.encode(captions), HALF * images])
        return images.astype(np.float16)

    def _open_index(self) -> tuple[PairIndex, ImageFiles]:
        return _opened(self.index, self.root, self.content)


def encode_images(
    embedder: OpenClipEmbedder, index: PairIndex, files: ImageFiles, first: int, stop: int, threads: int = 1
) -> np.ndarray:
    """Vectors of the images of pairs `first` to `stop` of an index, float32 [pairs, d].

    An image is read and encoded once however many of these pairs it has. Memory: a few batches of pixels.

    Args:
        embedder: its image tower and preprocessing.
        index, files: where images lie, and what reads them.
        first, stop: rows.
        threads: that decode.

    Returns:
        Unit rows; zeros where an image cannot be read or decoded.

    Raises:
        ModeError: a file is not the one that was indexed; a server does not answer; or the model gives NaN.
    """
    _, rows, owners = np.unique(index.image[first:stop], return_index=True, return_inverse=True)
    vectors = np.zeros((len(rows), embedder.clip.dimensions), np.float32)
    done = 0
    for pixels in prepared(files.read_many((first + rows).tolist()), embedder.preprocess, embedder.batch_size, threads):
        good = [number for number, each in enumerate(pixels) if each is not None]
        if good:
            batch = torch.stack([each for each in pixels if each is not None])
            vectors[done + np.array(good)] = embedder.encode_images(batch)
        done += len(pixels)
    files.check(first + rows)
    return vectors[owners]


def prepared(
    contents: Iterable[bytes | OSError], preprocess: Preprocess, batch_size: int, threads: int
) -> Iterator[list[Tensor | None]]:
    """Encoded images to pixels, in batches; uint8 [3, size, size], None for what cannot be read or decoded.

    Threads decode as far ahead as one batch.
    """

    def pixels(content: bytes | OSError) -> Tensor | None:
        if isinstance(content, OSError):
            return None
        try:
            return preprocess.pixels(decode(content).convert("RGB"))
        except Exception:  # what decoders raise on damaged files, MemoryError too, is not to be foreseen
            return None

    batch: list[Tensor | None] = []
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="decode") as pool:
        for each in in_order(lambda content: pool.submit(pixels, content), contents, batch_size):
            batch.append(each)
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


def count_unseen(path: Path, vectors: np.ndarray, index: PairIndex) -> int:
    """Images of an index that have no vector, as they could not be read or decoded.

    Args:
        path: the file of the vectors; it is read block by block.
        vectors: of view `image` or `both`, in that file, for its shape and type.
        index: whose pairs they are of.

    Raises:
        ModeError: that is all of them.
    """
    dimensions, unseen = vectors.shape[1], 0
    with path.open("rb") as file:
        file.seek(getattr(vectors, "offset", 0))
        for start in range(0, len(vectors), BLOCK):
            count = min(BLOCK, len(vectors) - start)
            block = np.fromfile(file, vectors.dtype, count * dimensions).reshape(count, dimensions)
            # The second half is of the image with either view.
            missing = ~block[:, dimensions // 2 :].any(axis=1)
            images = index.image[start : start + count]
            begins = np.diff(images, prepend=index.image[start - 1] if start else -1) != 0
            unseen += int((missing & begins).sum())
    if unseen and unseen == index.images:
        raise ModeError(f"{path}: none of {unseen:,} images can be decoded", "see the quarantine of the index")
    return unseen


@lru_cache(maxsize=1)
def _opened(folder: Path, root: Path, content: str | None) -> tuple[PairIndex, ImageFiles]:
    index = PairIndex.load(folder)
    if identity_of(folder) != content:
        raise ModeError(f"{folder}: another index on a worker", "all workers have to see the project folder")
    return index, ImageFiles(index, root)
