"""Images of an index by row, decoded once where memory allows."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from mode.columns import Column, Numbers, blocks_of
from mode.data.loading.pixels import aside, pixels_on_device, training_pixels
from mode.data.loading.selection import every_row
from mode.data.shards.index import PairIndex
from mode.data.shards.reading import ImageFiles, ImageReader, check_files
from mode.errors import ModeError
from mode.params import ImageParams

#: Files that are looked for at the start; beyond, a table's images are met one by one.
_FILES_TO_CHECK = 10_000

_UNREAD, _GOOD, _BAD = 0, 1, 2

Blocks: TypeAlias = Callable[[], Iterator[NDArray[np.int64]]]

_CPU = torch.device("cpu")


class ImageStore:
    """Reads, decodes and resizes images; keeps them if all that are wanted fit into memory.

    Args:
        index: where the images lie.
        root: folder that relative paths of the index start from.
        image: size, and whether training cuts random parts (then nothing can be kept).
        cache_mb: memory for decoded images in MiB; 0 keeps none.
        rows: int64, those that will be asked for, which the memory is reckoned for; default all of the index.
        reader: of the encoded images; default each from its place in the index.
        device: what they are for; a GPU by its number, for threads do not know which one another thread has chosen.

    Attributes:
        cached: whether decoded images are kept.
        device: where images are decoded: the given one if it is a GPU, `image.decode` asks for it, and none are kept;
            else the CPU.
        bad: samples that `make_loader` replaced because their image could not be read or decoded.

    Raises:
        ModeError: a file that holds images is missing, or another one than was indexed.
    """

    def __init__(
        self,
        index: PairIndex,
        root: Path,
        image: ImageParams,
        cache_mb: int,
        rows: Numbers | None = None,
        reader: ImageReader | None = None,
        device: torch.device = _CPU,
    ) -> None:
        self.image = image
        self.bad = 0
        self._index, self._root = index, root
        self._files: ImageReader = reader or ImageFiles(index, root)
        blocks = partial(every_row, len(index)) if rows is None else partial(blocks_of, rows)
        self._check_files(blocks)
        shape = (3, image.size, image.size)
        room = cache_mb * 2**20 // int(np.prod(shape)) if image.crop_scale is None else 0
        images = _distinct(index.image, blocks, room) if room else np.empty(0, np.int64)
        self.cached = 0 < len(images) <= room
        self.device = device if image.decode == "gpu" and not self.cached else _CPU
        if self.cached:
            # Anonymous shared memory: what one forked worker decodes, all have; nothing is taken from /dev/shm.
            self._images = images  # sorted: an image's place in it is its place in memory
            self._pixels = _shared((len(images), *shape))
            self._states = _shared((len(images),))

    def load(
        self, rows: np.ndarray, positions: np.ndarray | None = None, random_seed: int = 0
    ) -> tuple[torch.Tensor, np.ndarray]:
        """Images of pairs.

        Args:
            rows: int [batch], of the index.
            positions: int [batch], sample positions; given, and with `image.crop_scale` set, a random part is cut out
                of each image, decided by `random_seed` and its position. Otherwise open_clip's inference transform,
                as near as `image.decode` says.
            random_seed: of the training.

        Returns:
            uint8 [batch, 3, size, size] on `device`, and bool [batch]: which could be read. A bad image is replaced by
            the next good one of the batch (after the last comes the first); if none is good, all pixels are 0.

        Raises:
            ModeError: a file is not the one that was indexed; a server does not answer.
        """
        if self.device.type != "cpu":
            read = self._read(rows, positions)
            contents = [b"" if isinstance(content, OSError) else content for content in read]
            with aside(self.device) as hand_over:
                on_device, good = pixels_on_device(contents, self.image, positions, random_seed, self.device)
                if not good.all():
                    on_device = on_device[torch.from_numpy(replacements(good))]
                return hand_over(on_device), good
        if self.cached:
            pixels, good = self._load_cached(rows, positions)
        else:
            pixels = np.zeros((len(rows), 3, self.image.size, self.image.size), np.uint8)
            good = np.zeros(len(rows), bool)
            for number, content in enumerate(self._read(rows, positions)):
                position = None if positions is None else int(positions[number])
                good[number] = self._decode_into(pixels[number], content, position, random_seed)
        if not good.all():
            pixels = pixels[replacements(good)]
        return torch.from_numpy(pixels), good

    def place_of(self, row: int) -> str:
        """Where a pair's image lies, for people: file, and offset in it."""
        return self._files.place_of(int(row))

    def _read(self, rows: np.ndarray, positions: np.ndarray | None) -> Iterator[bytes | OSError]:
        return self._files.read_many(rows.tolist(), None if positions is None else positions.tolist())

    def _load_cached(self, rows: np.ndarray, positions: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        images = self._index.image[rows]
        slots = np.searchsorted(self._images, images)
        if len(rows) and (slots[-1:] >= len(self._images) or not np.array_equal(self._images[slots], images)):
            raise IndexError("rows that this store was not made for")
        unread = np.flatnonzero(self._states[slots] == _UNREAD)
        unread = unread[np.sort(np.unique(slots[unread], return_index=True)[1])]  # an image may be in the batch twice
        read = self._read(rows[unread], None if positions is None else positions[unread])
        for slot, content in zip(slots[unread], read, strict=True):
            good = self._decode_into(self._pixels[slot], content, None, 0)
            self._states[slot] = _GOOD if good else _BAD
        return self._pixels[slots], self._states[slots] == _GOOD

    def _decode_into(
        self, pixels: np.ndarray, content: bytes | OSError, position: int | None, random_seed: int
    ) -> bool:
        if isinstance(content, OSError):
            return False
        try:
            pixels[...] = training_pixels(content, self.image, position, random_seed)
        except Exception:  # what decoders raise on damaged files, MemoryError too, is not to be foreseen
            return False
        return True

    def _check_files(self, blocks: Blocks) -> None:
        places = self._files.places
        if places is self._index:
            # One more could not be found than there are: then the rest of the rows need not be looked at.
            files = _distinct(self._index.file, blocks, min(places.file_count - 1, _FILES_TO_CHECK))
        else:  # a pack has the files of these rows and no others
            files = np.arange(places.file_count)
        try:
            check_files(places, self._root, files[:_FILES_TO_CHECK].tolist())
        except (FileNotFoundError, NotADirectoryError) as error:
            what = f"{error.filename}: missing, but it was {places.made}"
            raise ModeError(what, places.remedy) from None


def _distinct(numbers: Column, blocks: Blocks, most: int) -> NDArray[Any]:
    """Distinct numbers of rows, ascending; if there are more than `most`, some, but more than `most`."""
    found: NDArray[Any] = numbers[:0]
    for rows in blocks():
        values = numbers[rows]  # mostly in order
        found = np.union1d(found, values[np.flatnonzero(np.diff(values, prepend=values[:1] - 1))])
        if len(found) > most:
            break
    return found


def replacements(good: np.ndarray) -> np.ndarray:
    """For each place of a batch itself if it is good, else the next good one, cyclically; int64 [batch].

    If none is good, every place stands for itself.

    Example:
        >>> replacements(np.array([True, False, False, True, False])).tolist()
        [0, 3, 3, 3, 0]
    """
    places = np.flatnonzero(good)
    if not len(places):
        return np.arange(len(good))
    following = np.searchsorted(places, np.arange(len(good)))
    return places[following % len(places)]


def _shared(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros (uint8) that processes forked from this one share."""
    return np.frombuffer(mmap.mmap(-1, int(np.prod(shape, dtype=np.int64))), np.uint8).reshape(shape)
