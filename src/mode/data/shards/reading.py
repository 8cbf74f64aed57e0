"""The encoded bytes of an index's images."""

from __future__ import annotations

import os
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from mode.data.shards.index import PairIndex
from mode.data.shards.places import ByteFile, LocalFile, RemoteFile, is_url

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
        self._index, self._root = index, root
        self._open: OrderedDict[int, LocalFile] = OrderedDict()
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

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
            yield from map(self._read_or_error, rows)
            return
        waiting: deque[int | Future[bytes | OSError]] = deque()
        try:
            for row in rows:
                # Local files are read in this thread: it may close one to open another.
                there = is_url(self._index.path(self._index.file[row]))
                waiting.append(self._threads().submit(self._read_or_error, row) if there else row)
                if len(waiting) >= _REQUESTS:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        finally:
            for future in waiting:
                if isinstance(future, Future):
                    future.cancel()

    def _result(self, asked: int | Future[bytes | OSError]) -> bytes | OSError:
        return asked.result() if isinstance(asked, Future) else self._read_or_error(asked)

    def _read_or_error(self, row: int) -> bytes | OSError:
        try:
            return self.read(row)
        except OSError as error:
            return error

    def _file(self, number: int) -> ByteFile:
        file = self._open.get(number)
        if file is None:
            path = self._index.path(number)
            if is_url(path):  # the index has seen to its length: the server need not be asked
                return RemoteFile(path, size=sys.maxsize)
            file = self._open[number] = LocalFile(self._root / path)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return file

    def _threads(self) -> ThreadPoolExecutor:
        """Threads of this process: those of the one that it was forked from did not come along."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = (os.getpid(), ThreadPoolExecutor(_REQUESTS, thread_name_prefix="objects"))
        return self._pool[1]

    def __del__(self) -> None:
        """Close what is open."""
        for file in getattr(self, "_open", {}).values():
            file.close()
