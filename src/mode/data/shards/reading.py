"""The encoded bytes of an index's images."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from mode.checksums import ADVICE
from mode.columns import Rows
from mode.data.shards.identity import HEADER, is_same, sample_of
from mode.data.shards.index import PairIndex
from mode.data.shards.places import ByteFile, LocalFile, RemoteFile, describe_all, is_url
from mode.data.shards.scan import LARGEST_IMAGE
from mode.errors import ModeError
from mode.parallel import in_order

#: Files kept open: far below the usual limit of 1,024 a process.
_OPEN_FILES = 128
#: Requests for images of objects under way at a time: answers take long, but many come side by side.
_REQUESTS = 32


class ChangedShard(ModeError):
    """A file is not the one that was indexed: what lies where the images were belongs to other captions."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(f"{path}: not the file that was indexed: {what}", "put it back, or index the source again")

    def __reduce__(self) -> tuple[Any, ...]:
        return ModeError, (str(self),)


class ImageFiles:
    """Reads images by row: one `pread` each, files kept open; or, of objects, one request by range.

    A file is compared with the index when it is opened, and again when it is written to while it is open; each image
    is when it is read (see `identity`). An object's ETag is compared by `check`.

    Args:
        index: where the images lie.
        root: folder that relative paths of the index start from.
    """

    def __init__(self, index: PairIndex, root: Path) -> None:
        self._index, self._root = index, root
        self._file = lru_cache(maxsize=_OPEN_FILES)(self._open)
        self._compared: dict[int, tuple[int, ...]] = {}  # file -> its state when its bytes were compared

    def read(self, row: int) -> bytes:
        """The encoded image of a pair.

        Raises:
            OSError: the file is gone, or cannot be read.
            ChangedShard: the file is another one than was indexed.
            ModeError: a server fails again and again.
        """
        number, length, offset = (int(each[row]) for each in (self._index.file, self._index.length, self._index.offset))
        if offset < 0 or not 0 <= length <= LARGEST_IMAGE:
            what = f"pair {row:,} has {length:,} bytes at byte {offset:,}"
            raise ModeError(f"{self._index.folder}: damaged: {what}", ADVICE)
        before, file = min(HEADER, offset), self._file(number)
        content = file.read(before + length, offset - before)
        header, content = content[:before], content[before:]
        if len(content) < length:
            raise ChangedShard(self._index.path(number), f"it ends inside the image at byte {offset}")
        if not is_same(int(self._index.check[row]), header, content):
            raise ChangedShard(self._index.path(number), f"another image is at byte {offset}")
        if isinstance(file, LocalFile) and file.has_changed():
            self._compare(number, file)
        return content

    def check(self, rows: Rows) -> None:
        """See that the objects that hold these rows are still those that were indexed, by size and ETag.

        What was read of them before is then what was indexed. Files of this machine are compared when they are read.

        Raises:
            FileNotFoundError: one is gone.
            ChangedShard: one is another one.
        """
        if self._index.has_urls:
            files = sorted(set(self._index.file[rows].tolist()))
            check_files(self._index, self._root, [file for file in files if is_url(self._index.path(file))])

    def read_many(self, rows: Sequence[int]) -> Iterator[bytes | OSError]:
        """`read` of each row, in order, its OSError in place of the bytes; several objects are asked for at once."""
        if not self._index.has_urls:
            return map(self._read_or_error, rows)
        threads = _threads(os.getpid())
        return in_order(lambda row: threads.submit(self._read_or_error, row), rows, _REQUESTS - 1)

    def _open(self, number: int) -> ByteFile:
        path = self._index.path(number)
        if is_url(path):
            # The index has seen to the length of an object: the server need not be asked.
            return RemoteFile(path, size=sys.maxsize)
        file = LocalFile(self._root / path)
        self._compare(number, file)
        return file

    def _compare(self, number: int, file: LocalFile) -> None:
        path, (size, sample, _) = self._index.path(number), self._index.identity(number)
        _check_size(path, file.size, size)
        # Files are opened again and again where there are many, but a look at a disk's far places takes long.
        if sample and self._compared.get(number) != file.state:
            if sample_of(file) != sample:
                raise ChangedShard(path, "as long as it was, but other bytes")
            self._compared[number] = file.state

    def _read_or_error(self, row: int) -> bytes | OSError:
        try:
            return self.read(row)
        except OSError as error:
            return error


def check_files(index: PairIndex, root: Path, files: Sequence[int]) -> None:
    """Compare size and ETag of files with those of the index, without reading them.

    Raises:
        FileNotFoundError: one is missing.
        ChangedShard: one is another one.
    """
    paths = [index.path(file) for file in files]
    for file, path, found in zip(files, paths, describe_all(paths, root), strict=True):
        size, _, etag = index.identity(file)
        _check_size(path, found.size, size)
        if etag not in (None, found.etag):
            raise ChangedShard(path, f"its ETag is {found.etag}, it was {etag}")


def _check_size(path: str, found: int, indexed: int) -> None:
    """Raise `ChangedShard` if a file is longer or shorter than it was."""
    if found != indexed:
        raise ChangedShard(path, f"{found:,} bytes, it had {indexed:,}")


@cache
def _threads(_process: int) -> ThreadPoolExecutor:
    """Threads of a process: those of the one that it was forked from did not come along."""
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="objects")
