"""Test images among the training images, found by perceptual hashes.

A test image is often in the web's data too, in another size, format or quality. Two images count as one if their
64-bit DCT hashes (pHash, Zauner 2010; by ImageHash) differ in a few bits only, and their small copies look alike too: a
hash alone takes all plain surfaces for one image. A copy that is cropped by more than a few percent is not found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import faiss
import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mode.data.images import UndecodableImage, decode
from mode.data.leakage import Leak, Leakage, TaskLeakage
from mode.data.shards.index import PairIndex
from mode.data.shards.reading import ImageFiles
from mode.evaluation.tasks import ImageBytes, Task
from mode.parallel import cores, ordered_map
from mode.progress import Progress

Item = TypeVar("Item")

#: Bits of 64 that a copy may differ in.
DISTANCE = 4
#: Side of the small grey copies, the least correlation of two that show the same, and how far those of plain surfaces,
#: which have none, may differ on average, of 255.
_SMALL, _CORRELATION, _PLAIN = 16, 0.9, 3.0
#: Images that one process takes at a time.
_BLOCK = 2_048


class Fingerprints(NamedTuple):
    """What images look like.

    Attributes:
        good: bool [n], whether the image could be decoded; the rest of its row is zero if not.
        hashes: uint8 [n, 8], 64 bits each.
        small: uint8 [n, _SMALL * _SMALL], grey.
    """

    good: NDArray[np.bool_]
    hashes: NDArray[np.uint8]
    small: NDArray[np.uint8]


def find_leakage(
    sources: Mapping[str, Path],
    root: Path,
    tasks: Sequence[Task],
    distance: int = DISTANCE,
    workers: int | None = None,
) -> Leakage:
    """Compare every training image with every test image.

    Args:
        sources: SOURCE -> folder of its index.
        root: folder that relative paths of the indexes start from.
        tasks: whose images are looked for.
        distance: bits in which hashes may differ, 0 to 64.
        workers: processes that decode; default one per core.
    """
    workers = cores() if workers is None else workers
    tests = [(task.name, image) for task in tasks for image in task.images]
    known = _joined(_fingerprinted("test images", _test_fingerprints, [image for _, image in tests], workers))
    searched = faiss.IndexBinaryFlat(64)
    searched.add(known.hashes)
    leaks: list[Leak] = []
    leaked: set[int] = set()
    images = {}
    for source, folder in sources.items():
        index = PairIndex.load(folder)
        images[source] = index.images
        look = partial(_training_fingerprints, folder, root, (folder / "pairs").stat().st_mtime_ns)
        found: dict[int, tuple[int, int]] = {}
        for start, block in zip(
            range(0, index.images, _BLOCK),
            _fingerprinted(f"images of {source}", look, range(index.images), workers),
            strict=True,
        ):
            for query, test, bits in _pairs(searched, known, block, distance):
                leaked.add(test)
                row = int(index.first[start + query])
                found[row] = min(found.get(row, (bits, test)), (bits, test))
        leaks += _named(source, folder, found, tests)
    counted = {task.name: TaskLeakage(images=len(task.images)) for task in tasks}
    for test in sorted(leaked):
        task, image = tests[test]
        counted[task].leaked.append(image.key)
    return Leakage(distance=distance, images=images, tasks=counted, leaks=leaks)


def fingerprint(image: Image.Image) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Hash (uint8 [8]) and small copy (uint8 [_SMALL * _SMALL]) of an image, both of its brightness alone."""
    grey = image.convert("RGB").convert("L")
    bits = imagehash.phash(grey).hash
    small = grey.resize((_SMALL, _SMALL), Image.Resampling.BOX)
    return np.packbits(bits.ravel()), np.asarray(small).ravel()


def _pairs(
    searched: faiss.IndexBinaryFlat, known: Fingerprints, block: Fingerprints, distance: int
) -> Iterator[tuple[int, int, int]]:
    """(number in the block, number of the test image, bits that differ) of all that look alike."""
    limits, bits, tests = searched.range_search(block.hashes, distance + 1)
    queries = np.repeat(np.arange(len(block.hashes)), np.diff(limits.astype(np.int64)).astype(np.int64))
    alike = _look_alike(block.small[queries], known.small[tests]) & block.good[queries] & known.good[tests]
    yield from zip(queries[alike].tolist(), tests[alike].tolist(), bits[alike].astype(int).tolist(), strict=True)


def _look_alike(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether two small copies show the same, uint8 [n, pixels] each; brightness and contrast may differ."""
    means = np.stack([one.mean(axis=1), other.mean(axis=1)])
    centred = np.stack([one, other]).astype(np.float32) - means[:, :, None]
    deviations = np.sqrt((centred**2).mean(axis=2))
    correlated = (centred[0] * centred[1]).mean(axis=1) >= _CORRELATION * deviations.prod(axis=0)
    plain = deviations.max(axis=0) < _PLAIN
    same: NDArray[np.bool_] = np.where(
        plain, np.abs(means[0] - means[1]) < _PLAIN, correlated & (deviations > 0).all(0)
    )
    return same


def _named(
    source: str, folder: Path, found: Mapping[int, tuple[int, int]], tests: Sequence[tuple[str, ImageBytes]]
) -> Iterator[Leak]:
    """Rows of an index, each with the bits that differ and the number of a test image, by their names."""
    index = PairIndex.load(folder)
    rows = sorted(found)
    for row, key in zip(rows, index.keys(rows), strict=True):
        bits, test = found[row]
        task, image = tests[test]
        file = index.path(int(index.file[row]))
        yield Leak(source=source, file=file, key=key, task=task, image=image.key, distance=bits)


def _fingerprinted(
    title: str, look: Callable[[Sequence[Item]], Fingerprints], items: Sequence[Item], workers: int
) -> Iterator[Fingerprints]:
    """Fingerprints of items, a block at a time and in order; `look` runs in `workers` processes."""
    starts = range(0, len(items), _BLOCK)
    blocks = (items[start : start + _BLOCK] for start in starts)
    with Progress(title, total=len(items), unit="images") as bar:
        for block in ordered_map(look, blocks, min(workers, len(starts))):
            bar.update(len(block.good))
            yield block


def _test_fingerprints(images: Sequence[ImageBytes]) -> Fingerprints:
    return _looked_at(image.read() for image in images)


def _training_fingerprints(folder: Path, root: Path, written: int, images: Sequence[int]) -> Fingerprints:
    index, files = _opened(folder, root, written)
    return _looked_at(files.read_many(index.first[images].tolist()))  # the first pair of every image


@lru_cache(maxsize=1)
def _opened(folder: Path, root: Path, _written: int) -> tuple[PairIndex, ImageFiles]:
    """Kept from one block to the next; `_written` tells an index from the one that was in the folder before."""
    index = PairIndex.load(folder)
    return index, ImageFiles(index, root)


def _looked_at(contents: Iterable[bytes | OSError]) -> Fingerprints:
    good, hashes, small = [], [], []
    for content in contents:
        try:
            if isinstance(content, OSError):
                raise UndecodableImage(str(content))
            bits, pixels = fingerprint(decode(content))
        except UndecodableImage:
            bits, pixels = np.zeros(8, np.uint8), np.zeros(_SMALL**2, np.uint8)
            good.append(False)
        else:
            good.append(True)
        hashes.append(bits)
        small.append(pixels)
    return Fingerprints(np.array(good), np.stack(hashes), np.stack(small))


def _joined(blocks: Iterable[Fingerprints]) -> Fingerprints:
    return Fingerprints(*map(np.concatenate, zip(*blocks, strict=True)))
