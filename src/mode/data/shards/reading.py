"""The encoded bytes of an index's images."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, partial
from pathlib import Path

from mode.data.shards.index import PairIndex
from mode.data.shards.places import ByteFile, LocalFile, RemoteFile, is_url
from mode.parallel import in_order

#: Files kept open: far below the usual limit of 1,024 a process.
_OPEN_FILES = 128
#: Requests for images of objects under way at a time: answers take long, but many come side by side.
_REQUESTS = 32


class ImageFiles:
    """Reads images by row: one `pread` each, files kept open; or, of objects, one request by range.

    Args:
        index: where the images lie.
        root: folder that relative paths of the index start from.
    """

    def __init__(self, index: PairIndex, root: Path) -> None:
        self._index = index
        self._file = lru_cache(maxsize=_OPEN_FILES)(partial(_open, index, root))

    def read(self, row: int) -> bytes:
        """The encoded image of a pair.

        Raises:
            OSError: the file is gone, or ends before the image does.
            ModeError: a server fails again and again.
        """
        number, length = int(self._index.file[row]), int(self._index.length[row])
        content = self._file(number).read(length, int(self._index.offset[row]))
        if len(content) < length:
            raise OSError(f"{self._index.path(number)}: ends inside an image")
        return content

    def read_many(self, rows: Sequence[int]) -> Iterator[bytes | OSError]:
        """`read` of each row, in order, its OSError in place of the bytes; several objects are asked for at once."""
        if not self._index.has_urls:
            return map(self._read_or_error, rows)
        threads = _threads(os.getpid())
        return in_order(lambda row: threads.submit(self._read_or_error, row), rows, _REQUESTS - 1)

    def _read_or_error(self, row: int) -> bytes | OSError:
        try:
            return self.read(row)
        except OSError as error:
            return error


def _open(index: PairIndex, root: Path, number: int) -> ByteFile:
    path = index.path(number)
    # The index has seen to the length of an object: the server need not be asked.
    return RemoteFile(path, size=sys.maxsize) if is_url(path) else LocalFile(root / path)


@cache
def _threads(_process: int) -> ThreadPoolExecutor:
    """Threads of a process: those of the one that it was forked from did not come along."""
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="objects")
