"""Which pairs a model is trained on: chosen a block at a time, and kept in files that all of its processes read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mode.checksums import ADVICE, content_of, write_manifest
from mode.columns import Column, Numbers, blocks_of, write_columns
from mode.data.shards.index import PairIndex
from mode.errors import ModeError, in_one_line
from mode.files import write_aside
from mode.permutation import permuted
from mode.progress import Progress

# Keep draws with the same seed apart.
_HELD_OUT, _HELD_OUT_ORDER, _OUTSIDE, _AGAIN = 1_000_003, 1_000_039, 1_000_081, 1_000_099

#: Files of a folder of pairs: three columns of int64, and the factors.
_COLUMNS, _FACTORS = ("rows", "first", "held_out"), "factors.json"


@dataclass(frozen=True)
class Pairs:
    """The pairs of a training, grouped by image.

    Attributes:
        rows: int64 [pairs], ascending rows of the index.
        first: int64 [images + 1], place in `rows` of the first pair of each image, then their number.
        held_out: int64, ascending rows that would be among them, were their images not held out.
        factors: (images, factor) of consecutive images that a pass visits equally often, see `PairStream`.
        digest: SHA-256 of all of it, as 64 hexadecimal digits.
    """

    rows: Numbers
    first: Numbers
    held_out: Numbers
    factors: Sequence[tuple[int, float]]
    digest: str

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def images(self) -> int:
        """Distinct images of the pairs."""
        return len(self.first) - 1

    @classmethod
    def of(cls, rows: NDArray[np.int64], image: Numbers, factor: NDArray[np.float64] | None = None) -> Pairs:
        """A few pairs, in memory.

        Args:
            rows: of the index, each once.
            image: number of the image of every pair of the index, ascending.
            factor: of each of `rows`; default 1.

        Example:
            >>> Pairs.of(np.array([0, 1, 3]), np.array([0, 0, 1, 1])).first.tolist()
            [0, 2, 3]
        """
        order = np.argsort(rows, kind="stable")
        rows = np.asarray(rows, np.int64)[order]
        begins = np.flatnonzero(_begins(image[rows], -1))
        first = np.append(begins, len(rows))
        factors = _joined([(1, 1.0 if factor is None else float(factor[order][place])) for place in begins])
        digest = hashlib.sha256(json.dumps(factors).encode())
        for array in (rows, first):
            digest.update(array.astype(np.int64).data)
        return cls(rows, first, np.empty(0, np.int64), factors, digest.hexdigest())

    @classmethod
    def open(cls, folder: Path) -> Pairs:
        """What `write_pairs` wrote.

        Raises:
            ModeError: it is missing or damaged, as far as lengths say. What it says is looked at where it is used.
        """
        rows, first, held_out = (Column(folder / f"{name}.npy", np.int64) for name in _COLUMNS)
        try:
            factors = [(int(images), float(factor)) for images, factor in json.loads((folder / _FACTORS).read_text())]
            if not all(images > 0 and 0 < factor < np.inf for images, factor in factors):
                raise ValueError("a factor that is none")
            if not len(first) or first[-1] != len(rows) or sum(images for images, _ in factors) != len(first) - 1:
                raise ValueError("its files do not belong together")
        except (OSError, ValueError, TypeError) as error:
            raise ModeError(f"{folder}: damaged: {in_one_line(error)}", ADVICE) from None
        return cls(rows, first, held_out, factors, content_of(folder))


def write_pairs(
    folder: Path,
    index: PairIndex,
    rows: Iterable[NDArray[np.int64]],
    held_out: int,
    random_seed: int,
    beside: Iterable[NDArray[np.int64]] = (),
) -> None:
    """Write the folder that `Pairs.open` opens, in memory that does not grow with the number of pairs.

    Args:
        folder: to write, as a whole or not at all.
        index: of the pairs.
        rows: ascending rows of the index, in blocks: what is to be trained on, and what would be, were it not held out.
        held_out: images of the index whose pairs are left out, see `is_held_out`.
        random_seed: of these.
        beside: ascending rows of the index, in blocks, none of `rows`: pairs of images that were held out before the
            index was written, as that of an update has them.

    Raises:
        ModeError: nothing would be left to train on, or the index is damaged.
    """
    if held_out >= index.images:
        raise ModeError(f"training.held_out: {held_out} of {index.images} images", "leave some to train on")
    count, last = 0, -1
    factors: list[tuple[int, float]] = []
    with write_aside(folder) as aside, ExitStack() as files, Progress("choose pairs", unit="pairs") as bar:
        schemas = {name: pa.schema([(name, pa.int64())]) for name in _COLUMNS}
        written = {name: files.enter_context(write_columns(aside, schema)) for name, schema in schemas.items()}

        def write(name: str, numbers: NDArray[np.int64]) -> None:
            written[name].write(pa.table({name: numbers}))

        for block in rows:
            images = index.image[block]
            is_left = is_held_out(images, held_out, index.images, random_seed)
            write("held_out", block[is_left])
            block, images = block[~is_left], images[~is_left]
            if len(images) and (images[0] < last or (np.diff(images) < 0).any()):
                raise ModeError(f"{index.folder}: damaged: the numbers of its images do not ascend", ADVICE)
            begins = np.flatnonzero(_begins(images, last))
            write("rows", block)
            write("first", count + begins)
            factors = _joined([*factors, *_factors_of(index, block[begins])])
            count, last = count + len(block), int(images[-1]) if len(images) else last
            bar.update(len(block))
        for block in beside:
            write("held_out", block)
        write("first", np.array([count]))
        files.close()
        (aside / _FACTORS).write_text(json.dumps(factors), encoding="utf-8")
        write_manifest(aside)


def _begins(images: NDArray[np.int64], last: int) -> NDArray[np.bool_]:
    """Whether a pair has another image than the one before it; before the first one is one with image `last`."""
    begins: NDArray[np.bool_] = np.diff(images, prepend=last) != 0
    return begins


def _factors_of(index: PairIndex, rows: NDArray[np.int64]) -> list[tuple[int, float]]:
    """(images, factor) of images, each given by one of its pairs."""
    if index.factor is None or not len(rows):
        return [(len(rows), 1.0)] if len(rows) else []
    of_each = index.factor[index.file[rows]]
    starts = np.flatnonzero(np.diff(of_each, prepend=np.nan) != 0)
    return list(zip(np.diff(starts, append=len(rows)).tolist(), of_each[starts].tolist(), strict=True))


def _joined(factors: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The same with neighbours of one factor together."""
    alike = groupby(factors, key=lambda each: each[1])
    return [(sum(images for images, _ in group), factor) for factor, group in alike]


def expert_rows(
    coarse: Callable[[], Iterator[NDArray[np.int32]]], cluster: int, outside_share: float, random_seed: int
) -> Iterator[NDArray[np.int64]]:
    """The pairs of one cluster and a few of the others (MoDE paper, section 4.1: "slightly better than 0").

    Args:
        coarse: gives the coarse cluster of every pair, int32, in blocks; it is called twice.
        cluster: the expert's own.
        outside_share: share of the pairs *outside* the cluster that are added, rounded to the nearest whole number.
        random_seed: of the sample; clusters draw independently of one another.

    Yields:
        Rows of each block, int64, ascending, each once.

    Raises:
        ModeError: no pair belongs to the cluster.

    Example:
        >>> [*expert_rows(lambda: iter([np.array([0, 1, 0, 1], np.int32)]), 1, outside_share=0.0, random_seed=0)]
        [array([1, 3])]
    """
    sizes = [(len(block), int(np.count_nonzero(block == cluster))) for block in coarse()]
    own = sum(inside for _, inside in sizes)
    if not own:
        raise ModeError(f"cluster {cluster} has no pairs to train an expert on", "choose a smaller clustering.coarse")
    others = sum(all_of_it for all_of_it, _ in sizes) - own
    count, row, other = round(outside_share * others), 0, 0
    for block in coarse():
        chosen = block == cluster
        outside = np.flatnonzero(~chosen)
        if count:
            # Of all pairs outside, those that a permutation takes to the first `count` places.
            numbers = np.arange(other, other + len(outside))
            chosen[outside] = permuted(numbers, others, random_seed, _OUTSIDE, cluster) < count
        yield row + np.flatnonzero(chosen)
        row, other = row + len(block), other + len(outside)


def some_rows(
    blocks: Callable[[], Iterable[NDArray[np.int64]]], number: int, random_seed: int
) -> Iterator[NDArray[np.int64]]:
    """So many of some rows, drawn at random, or all if there are no more.

    Args:
        blocks: gives the rows, in blocks; it is called twice.
        number: of rows to draw.
        random_seed: of the draw.

    Yields:
        The rows of each block that are drawn, in their order.

    Example:
        >>> [*some_rows(lambda: [np.array([3, 5]), np.array([8])], 7, random_seed=0)]
        [array([3, 5]), array([8])]
    """
    total, first = sum(len(rows) for rows in blocks()), 0
    for rows in blocks():
        places = permuted(np.arange(first, first + len(rows)), total, random_seed, _AGAIN)
        yield rows[places < number]
        first += len(rows)


def every_row(pairs: int, block: int = 1 << 20) -> Iterator[NDArray[np.int64]]:
    """All rows of an index of so many pairs, in blocks."""
    for start in range(0, pairs, block):
        yield np.arange(start, min(start + block, pairs))


def is_held_out(image: NDArray[np.int64], count: int, images: int, random_seed: int) -> NDArray[np.bool_]:
    """Whether no model is trained on an image, with any of its captions.

    Args:
        image: numbers of images, int64 [n].
        count: of all images, how many are held out.
        images: of the source.
        random_seed: the same numbers give the same images.

    Returns:
        bool [n]; of all images, exactly `count` are true.

    Example:
        >>> int(is_held_out(np.arange(10), 3, 10, random_seed=0).sum())
        3
    """
    if not count:
        return np.zeros(len(image), bool)
    held_out: NDArray[np.bool_] = permuted(image, images, random_seed, _HELD_OUT) < count
    return held_out


def without_held_out(
    blocks: Iterable[NDArray[np.int64]], index: PairIndex, held_out: int, random_seed: int
) -> Iterator[NDArray[np.int64]]:
    """Rows of an index, in blocks, but for those of the images that `is_held_out` names."""
    for rows in blocks:
        yield rows[~is_held_out(index.image[rows], held_out, index.images, random_seed)]


def only_held_out(
    blocks: Iterable[NDArray[np.int64]], index: PairIndex, held_out: int, random_seed: int
) -> Iterator[NDArray[np.int64]]:
    """The others: of rows of an index, in blocks, those of the images that `is_held_out` names."""
    for rows in blocks:
        yield rows[is_held_out(index.image[rows], held_out, index.images, random_seed)]


def held_out_pairs(pairs: Pairs, image: Numbers, count: int, random_seed: int) -> NDArray[np.int64]:
    """Those pairs that are held out: one of each image, and so many of them in a random order.

    Args:
        pairs: of a training.
        image: number of the image of every pair of the source, int64 [pairs of the source].
        count: of pairs, at most.
        random_seed: of the order.
    """
    last, firsts = -1, [np.empty(0, np.int64)]
    for rows in blocks_of(pairs.held_out):
        images = image[rows]
        firsts.append(rows[_begins(images, last)])
        last = int(images[-1])
    first = np.concatenate(firsts)
    return first[permuted(np.arange(min(count, len(first))), len(first), random_seed, _HELD_OUT_ORDER)]
