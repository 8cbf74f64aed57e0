"""Images that lie near each other, read together: one request for many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mode.data.shards.identity import HEADER
from mode.data.shards.reading import ImageFiles, Located

#: Unwanted bytes between two images that are read over: what a request costs where one takes 30 ms, some 25 are under
#: way and all of them together get 100 MB/s.
GAP = 128 * 2**10
#: Bytes of one request: longer ones are hardly faster, and each is in memory as a whole.
LONGEST = 8 * 2**20


class Range(NamedTuple):
    """Bytes of a file that are read at once; they hold the images `first .. last` of a chunk."""

    file: int
    start: int
    stop: int
    first: int
    last: int


def bounds(located: Located) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First byte of each image's header in its file, and the byte behind the image; int64 [n] each."""
    offset = located.offset.astype(np.int64)
    return offset - np.minimum(offset, HEADER), offset + located.length


def read_near(files: ImageFiles, located: Located) -> Iterator[bytes]:
    """The header and the bytes of each image, none of them compared; zeros where there is nothing to be read.

    Args:
        files: to read from.
        located: images that ascend by file and place.

    Raises:
        ModeError: a server fails again and again; a file is another one.
    """
    first, last = bounds(located)
    for each in joined(located.file, first, last):
        try:
            content = files.read_range(each.file, each.start, each.stop)
        except OSError:  # who compares the image then learns why
            content = b""
        for start, stop in zip(
            first[each.first : each.last].tolist(), last[each.first : each.last].tolist(), strict=True
        ):
            yield content[start - each.start : stop - each.start].ljust(stop - start, b"\0")


def joined(
    file: NDArray[np.integer], first: NDArray[np.int64], last: NDArray[np.int64], gap: int = GAP, longest: int = LONGEST
) -> list[Range]:
    """The ranges to read for images that ascend by file and place.

    Args:
        file: int [images], number of the file of each.
        first, last: int64 [images], its first byte, and the one behind its last.
        gap: unwanted bytes between two images, at most, that are read over.
        longest: bytes of a range, at most; an image that is longer has one of its own.

    Example:
        >>> joined(np.array([0, 0, 0, 1]), np.array([0, 15, 50, 0]), np.array([10, 25, 60, 10]), gap=9)
        [Range(file=0, start=0, stop=25, first=0, last=2), Range(file=0, start=50, stop=60, first=2, last=3), \
Range(file=1, start=0, stop=10, first=3, last=4)]
    """
    ranges: list[Range] = []
    for number, (of, start, stop) in enumerate(zip(file.tolist(), first.tolist(), last.tolist(), strict=True)):
        before = ranges[-1] if ranges else None
        if before and before.file == of and 0 <= start - before.stop <= gap and stop - before.start <= longest:
            ranges[-1] = before._replace(stop=stop, last=number + 1)
        else:
            ranges.append(Range(of, start, stop, number, number + 1))
    return ranges
