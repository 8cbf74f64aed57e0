"""Vectors read block by block, so that memory does not grow with their number, and the centres nearest to them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import cycle
from typing import Any

import faiss
import numpy as np

from mode.checksums import ADVICE
from mode.errors import ModeError
from mode.parallel import in_order
from mode.vectors import LARGEST, within

#: Rows of a block, by default. The float32 copies of two blocks are what a pass keeps in memory.
BLOCK = 32_768
#: Rows that are picked out of a mapped file before its pages are released: the system maps 64 kB around each.
PICKED = 1_024


class Rows:
    """Some or all rows of an array, given out in float32 blocks.

    Pages of a memory-mapped file are released after each block: what has been read does not count as this process's
    memory.

    Args:
        vectors: float16 or float32 [all, d], in memory or memory-mapped.
        chosen: int64, ascending row numbers; default all.
        block: rows that are read, converted and searched together.
        first: number of the first row in its file, for messages.

    Raises:
        ModeError: not a two-dimensional array of floats. When they are read: a number is NaN or infinite or, in a
            memory-mapped file, larger than those of unit vectors.
    """

    def __init__(
        self, vectors: np.ndarray, chosen: np.ndarray | None = None, block: int = BLOCK, first: int = 0
    ) -> None:
        if vectors.ndim != 2 or vectors.dtype.kind != "f" or not vectors.shape[1]:
            raise ModeError(
                f"vectors: {vectors.dtype} {list(vectors.shape)} instead of floats [pairs, dimensions]",
                "embed the captions again",
            )
        self.block, self._first = block, first
        self._vectors, self._chosen = vectors, chosen
        self._mapping = _mapping_of(vectors)
        self._largest = LARGEST if self._mapping is not None else float(np.finfo(vectors.dtype).max)

    def __len__(self) -> int:
        return len(self._vectors) if self._chosen is None else len(self._chosen)

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return int(self._vectors.shape[1])

    def subset(self, rows: np.ndarray) -> Rows:
        """Only these of the rows (ascending numbers among the rows of this object)."""
        return Rows(self._vectors, rows if self._chosen is None else self._chosen[rows], self.block, self._first)

    def in_memory(self) -> Rows:
        """The same rows, copied out of a file: for chosen ones that are read again and again."""
        copy = np.empty((len(self), self.dimensions), dtype=self._vectors.dtype)
        for which, block in self.blocks():
            copy[which] = block[:, :-1]
        return Rows(copy, block=self.block)

    def sample(self, most: int, random: np.random.Generator) -> np.ndarray:
        """Ascending numbers of at most so many of the rows, each at most once, int64."""
        if len(self) <= most:
            return np.arange(len(self), dtype=np.int64)
        return np.sort(random.choice(len(self), most, replace=False))

    @property
    def bytes(self) -> int:
        """Size of the rows as they are stored."""
        return len(self) * self.dimensions * self._vectors.dtype.itemsize

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Which rows, and their vectors as float32 [b, d + 1] with a last column of zeros (see `NearestCentre`).

        While a block is worked on, a thread reads and converts the next one. Two buffers take turns: a block is valid
        until the next one is asked for.
        """
        size = self.block
        shape = (min(size, len(self)), self.dimensions + 1)
        buffers = cycle([np.zeros(shape, dtype=np.float32) for _ in range(2)])
        parts = [slice(start, min(start + size, len(self))) for start in range(0, len(self), size)]
        with ThreadPoolExecutor(1, thread_name_prefix="rows") as pool:
            blocks = in_order(lambda which: pool.submit(self._read, which, next(buffers)), parts, ahead=1)
            yield from zip(parts, blocks, strict=True)

    def _read(self, which: slice, buffer: np.ndarray) -> np.ndarray:
        block = buffer[: which.stop - which.start]
        if self._chosen is None:
            block[:, :-1] = self._checked(self._vectors[which], range(which.start, which.stop))
            self._release()
        else:
            self._pick(self._chosen[which], block)
        return block

    def take(self, rows: np.ndarray) -> np.ndarray:
        """These rows as float32 [b, d + 1], as `blocks` gives them."""
        block = np.zeros((len(rows), self.dimensions + 1), dtype=np.float32)
        self._pick(rows if self._chosen is None else self._chosen[rows], block)
        return block

    def _pick(self, rows: np.ndarray, block: np.ndarray) -> None:
        """Copy rows that lie anywhere, releasing their pages now and then."""
        for start in range(0, len(rows), PICKED):
            some = slice(start, start + PICKED)
            block[some, :-1] = self._checked(self._vectors[rows[some]], rows[some])
            self._release()

    def _checked(self, read: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """What was read of these rows; numbers that no embedder writes are refused."""
        if not within(read, self._largest):
            wrong = ~(np.abs(read.astype(np.float64)) <= self._largest)
            place = int(np.flatnonzero(wrong.any(axis=1))[0])
            number, row = read[place][wrong[place]][0], self._first + int(rows[place])
            name = getattr(self._vectors, "filename", None) or "vectors"
            raise ModeError(f"{name}: damaged: {number:.6g} in row {row:,} is of no unit vector", ADVICE)
        return read

    def _release(self) -> None:
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)


def _mapping_of(vectors: np.ndarray) -> mmap.mmap | None:
    """The file mapping behind an array that is only read, where the system can release its pages."""
    if not isinstance(vectors, np.memmap) or vectors.mode != "r" or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    base: object = vectors
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


class NearestCentre:
    """The centres c with the smallest |x - c|^2 + price(c).

    A price is one more coordinate: with x' = (x, 0) and c' = (c, sqrt(price)) the sum is |x' - c'|^2, so faiss's exact
    L2 search does all the work. Only differences between prices matter, hence they are shifted to be at least 0.

    Args:
        centres: float32 [k, d].
        prices: [k], default all equal.
    """

    def __init__(self, centres: np.ndarray, prices: np.ndarray | None = None) -> None:
        extended = np.zeros((len(centres), centres.shape[1] + 1), dtype=np.float32)
        extended[:, :-1] = centres
        if prices is not None:
            extended[:, -1] = np.sqrt(prices - prices.min())
        index = faiss.IndexFlatL2(extended.shape[1])
        self._index = faiss.index_cpu_to_gpu(_gpu(), 0, index) if faiss.get_num_gpus() else index
        self._index.add(extended)

    def search(self, block: np.ndarray, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The `count` nearest centres of each row of a block (as `Rows` gives them), nearest first.

        Returns:
            priced squared distances, float32 [b, count], and numbers of centres, int64 [b, count].
        """
        distances, numbers = self._index.search(block, count)
        return np.maximum(distances, 0.0), numbers


@cache
def _gpu() -> Any:
    """Working memory of faiss on the GPU: taken once, as that takes a second."""
    return faiss.StandardGpuResources()
