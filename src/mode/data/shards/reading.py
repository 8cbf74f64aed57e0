"""The encoded bytes of an index's images."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mode.checksums import ADVICE
from mode.columns import Rows
from mode.data.shards.identity import HEADER, is_same, sample_of
from mode.data.shards.places import (
    ByteFile,
    Description,
    LocalFile,
    RemoteFile,
    WrongRange,
    describe,
    describe_all,
    is_url,
)
from mode.data.shards.scan import LARGEST_IMAGE
from mode.errors import ModeError
from mode.parallel import Threads, in_order

#: Files kept open: far below the usual limit of 1,024 a process.
_OPEN_FILES = 128
#: Requests for images of objects under way at a time: answers take long, but many come side by side.
_REQUESTS = 32


class ChangedShard(ModeError):
    """A file is not the one that it was: what lies where the images were belongs to other captions.

    Args:
        path: of the file.
        what: tells it from the one that it was.
        places: that know of the one that it was.
    """

    def __init__(self, path: str, what: str, places: Places) -> None:
        super().__init__(f"{path}: not the file that was {places.made}: {what}", places.remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        return ModeError, (str(self),)


class Located(NamedTuple):
    """Where images lie.

    Attributes:
        file: int [n], number of the file that holds each.
        offset, length: int [n], bytes of each in its file.
        check: int [n], what tells each from another image, see `identity`.
    """

    file: NDArray[Any]
    offset: NDArray[Any]
    length: NDArray[Any]
    check: NDArray[Any]


class Places(Protocol):
    """What knows where the image of a pair lies: the index of a source, or a pack of a training's images.

    Attributes:
        folder: of this knowledge, for people.
        made: what was done with the files when they were as they have to be, for people: "indexed".
        remedy: what to do about a file that is missing or another one, for people.
        has_urls: whether images lie in objects, and not only in files of this machine.
        file_count: number of files that hold images.
    """

    folder: Path

    @property
    def made(self) -> str: ...

    @property
    def remedy(self) -> str: ...

    @property
    def has_urls(self) -> bool: ...

    @property
    def file_count(self) -> int: ...

    def locate(self, rows: Rows) -> Located:
        """Where the images of pairs lie, in the order asked for."""

    def path(self, file: int) -> str:
        """Path or URL of one file by its number."""

    def identity(self, file: int) -> tuple[int, int, str | None]:
        """Size in bytes, sample and ETag of one file as they were."""


class ImageReader(Protocol):
    """What gives the encoded images of pairs.

    Attributes:
        places: where they lie.
    """

    places: Places

    def read_many(self, rows: Sequence[int], positions: Sequence[int] | None = None) -> Iterator[bytes | OSError]:
        """Images of pairs, in order, an OSError in place of one that cannot be read.

        Args:
            rows: of the index.
            positions: at which a training sees them, ascending, where it is one that asks.
        """

    def place_of(self, row: int) -> str:
        """Where a pair's image lies, for people: file, and offset in it."""


class ImageFiles:
    """Reads images by row: one `pread` each, files kept open; or, of objects, one request by range.

    A file is compared with the index when it is opened, and again when it is written to while it is open; each image
    is when it is read (see `identity`). An object's ETag is compared by `check`, and with each answer of a server that
    sends one (see `RemoteFile`).

    Args:
        places: where the images lie.
        root: folder that relative paths start from.
    """

    def __init__(self, places: Places, root: Path) -> None:
        self.places, self._root = places, root
        self._file = lru_cache(maxsize=_OPEN_FILES)(self._open)
        self._compared: dict[int, tuple[int, ...]] = {}  # file -> its state when its bytes were compared

    def read(self, row: int) -> bytes:
        """The encoded image of a pair.

        Raises:
            OSError: the file is gone, or cannot be read.
            ChangedShard: the file is another one than was indexed.
            ModeError: a server fails again and again.
        """
        [place] = self._places_of([row])
        return self._read(place)

    def check(self, rows: Rows) -> None:
        """See that the objects that hold these rows are still those that were indexed, by size and ETag.

        What was read of them before is then what was indexed. Files of this machine are compared when they are read.

        Raises:
            FileNotFoundError: one is gone.
            ChangedShard: one is another one.
        """
        if self.places.has_urls:
            files = sorted(set(self.places.locate(rows).file.tolist()))
            check_files(self.places, self._root, [file for file in files if is_url(self.places.path(file))])

    def read_many(self, rows: Sequence[int], positions: Sequence[int] | None = None) -> Iterator[bytes | OSError]:  # noqa: ARG002 (it reads in any order)
        """`read` of each row, in order, its OSError in place of the bytes; several objects are asked for at once."""
        places = self._places_of(rows)
        if not self.places.has_urls:
            return map(self._read_or_error, places)
        threads = _threads(os.getpid())
        return in_order(lambda place: threads.submit(partial(self._read_or_error, place)), places, _REQUESTS - 1)

    def read_range(self, file: int, start: int, stop: int) -> bytes:
        """Bytes of a file as they are: fewer at its end, and no image in them compared. Raises as `read`."""
        try:
            return self._file(file).read(stop - start, start)
        except WrongRange as wrong:
            raise self._changed(file) or wrong from None

    def locate(self, rows: Rows) -> Located:
        """Where the images of pairs lie.

        Raises:
            ModeError: the index is damaged: at no place, or longer than any image.
        """
        located = self.places.locate(rows)
        wrong = (located.offset < 0) | (located.length < 0) | (located.length > LARGEST_IMAGE)
        if wrong.any():
            [first, *_] = np.flatnonzero(wrong).tolist()
            what = f"pair {rows[first]:,} has {located.length[first]:,} bytes at byte {located.offset[first]:,}"
            raise ModeError(f"{self.places.folder}: damaged: {what}", ADVICE)
        return located

    def place_of(self, row: int) -> str:
        """Where a pair's image lies, for people: file, and offset in it."""
        [place] = self._places_of([row])
        return f"{self.places.path(place.file)} at byte {place.offset}"

    def _places_of(self, rows: Sequence[int]) -> list[_Place]:
        located = self.locate(np.asarray(rows, np.int64))
        return [_Place(*each) for each in zip(*(column.tolist() for column in located), strict=True)]

    def _read(self, place: _Place) -> bytes:
        before = min(HEADER, place.offset)
        content = self.read_range(place.file, place.offset - before, place.offset + place.length)
        header, content = content[:before], content[before:]
        if len(content) < place.length:
            what = f"it ends inside the image at byte {place.offset}"
            raise ChangedShard(self.places.path(place.file), what, self.places)
        if not is_same(place.check, header, content):
            what = f"another image is at byte {place.offset}"
            raise self._changed(place.file) or ChangedShard(self.places.path(place.file), what, self.places)
        file = self._file(place.file)
        if isinstance(file, LocalFile) and file.has_changed():
            self._compare(place.file, file)
        return content

    def _open(self, number: int) -> ByteFile:
        path = self.places.path(number)
        if is_url(path):
            # The index has seen to the length of an object: the server need not be asked.
            return RemoteFile(path, size=sys.maxsize, etag=self.places.identity(number)[2])
        file = LocalFile(self._root / path)
        self._compare(number, file)
        return file

    def _compare(self, number: int, file: LocalFile) -> None:
        _, sample, etag = self.places.identity(number)
        if error := _other(self.places, number, Description(file.size, 0, etag)):
            raise error
        # Files are opened again and again where there are many, but a look at a disk's far places takes long.
        if sample and self._compared.get(number) != file.state:
            if sample_of(file) != sample:
                raise ChangedShard(self.places.path(number), "as long as it was, but other bytes", self.places)
            self._compared[number] = file.state

    def _changed(self, number: int) -> ChangedShard | None:
        """The error that an object is another one, if its server says so now."""
        path = self.places.path(number)
        if not is_url(path):
            return None
        return _other(self.places, number, describe(path, self._root))

    def _read_or_error(self, place: _Place) -> bytes | OSError:
        try:
            return self._read(place)
        except OSError as error:
            return error


class _Place(NamedTuple):
    """Of one image, as `Located`."""

    file: int
    offset: int
    length: int
    check: int


def check_files(places: Places, root: Path, files: Sequence[int]) -> None:
    """Compare size and ETag of files with those that they had, without reading them.

    Raises:
        FileNotFoundError: one is missing.
        ChangedShard: one is another one.
    """
    paths = [places.path(file) for file in files]
    for file, found in zip(files, describe_all(paths, root), strict=True):
        if error := _other(places, file, found):
            raise error


def _other(places: Places, file: int, found: Description) -> ChangedShard | None:
    """The error that a file or object is not the one that it was, if size or ETag tell."""
    size, _, etag = places.identity(file)
    if found.size != size:
        return ChangedShard(places.path(file), f"{found.size:,} bytes, it had {size:,}", places)
    if etag and found.etag and etag != found.etag:
        return ChangedShard(places.path(file), f"its ETag is {found.etag}, it was {etag}", places)
    return None


@cache
def _threads(_process: int) -> Threads:
    """Threads of a process: those of the one that it was forked from did not come along."""
    return Threads(_REQUESTS, "objects")
