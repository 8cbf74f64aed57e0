"""Images of a training that is read in long ranges: fetched some time before they are needed, and kept on the disk.

The chunks of the present window and of the next one (see `windows`) are files of a folder that all processes of a
machine share; of each chunk, a machine has the images that its own processes take (see `shares`). Each process fetches
what nobody has yet: who writes a chunk holds a lock on the file that it writes to, which ends with the process, and
moves it into place when it is whole. A file holds nothing but images, one after the other with the tar header before
each, in an order that everyone can work out. It is a cache: what is missing in it, damaged or removed is fetched again,
and each image is compared with the index when it is taken out.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mode.columns import blocks_of
from mode.data.loading.ranges import bounds, read_near
from mode.data.loading.selection import Pairs
from mode.data.loading.shares import Shares
from mode.data.loading.stream import Chunk, PairStream, Window
from mode.data.loading.windows import CHUNK
from mode.data.shards.identity import HEADER, is_same
from mode.data.shards.places import LocalFile
from mode.data.shards.reading import ImageFiles, Located
from mode.errors import ModeError
from mode.parallel import Threads

log = logging.getLogger(__name__)

#: Requests of a machine under way at a time.
REQUESTS = 32
#: Chunks kept open, and those of which a process knows where each image lies; windows of which it knows what is wanted.
_OPEN_CHUNKS, _KNOWN_CHUNKS, _KNOWN_WINDOWS = 128, 4_096, 4

#: Of a chunk's file: pass, window, slot, and the machine whose images it holds.
_NAME = re.compile(r"(\d+)-(\d+)-(\d+)-(\d+)(\.part)?")


class _Layout(NamedTuple):
    """What a chunk's file holds.

    Attributes:
        images: int64 [images], by their numbers among the pairs of the training, ascending.
        located: where the images lie at their source.
        begins: int64 [images + 1], byte of the file at which the header of each begins, then its length.
    """

    images: NDArray[np.int64]
    located: Located
    begins: NDArray[np.int64]


class Spool:
    """Reads the images of a stream with windows, as `ImageReader` wants it.

    Where a process begins to read, in the middle of a window or at its first sample, it does not wait until the window
    is there: it asks for images that are needed sooner one by one.

    Args:
        folder: of the chunks; of this training alone.
        files: where images come from.
        stream: in which order.
        shares: which of them are for this machine; nothing outside is fetched.
        requests: of this process, under way at a time; processes of a machine share `REQUESTS`.

    Attributes:
        until: position from which nothing more is fetched before it is needed, at first the end of the training.
    """

    def __init__(self, folder: Path, files: ImageFiles, stream: PairStream, shares: Shares, requests: int) -> None:
        self.places, self.until = files.places, shares.stop
        self._folder, self._files, self._stream, self._shares = folder, files, stream, shares
        self._requests = max(2, requests)
        self._layout: Callable[[Chunk], _Layout] = lru_cache(_KNOWN_CHUNKS)(self._layout_of)
        self._open: Callable[[Chunk], LocalFile] = lru_cache(_OPEN_CHUNKS)(self._fetched)
        self._wanted: Callable[[int, int], dict[int, NDArray[np.int64]]] = lru_cache(_KNOWN_WINDOWS)(self._wanted_in)
        self._passed = Chunk(-1, -1, -1)
        # Of the process that reads; a fork begins with none. `_next` is the first window that was not asked for; at
        # `_edge` the window begins that is behind the samples that were read; `_begun` is the end of the first one.
        self._process, self._edge, self._begun = 0, 0, 0
        self._threads = Threads(self._requests, "spool")
        self._ahead: Iterator[Window] = iter(())
        self._next: Window | None = None

    def read_many(self, rows: Sequence[int], positions: Sequence[int] | None = None) -> Iterator[bytes | OSError]:
        """Images of pairs, see `ImageReader`; without positions they come from the source."""
        if positions is None or not len(rows):
            yield from self._files.read_many(rows)
            return
        self._announce(int(positions[0]), int(positions[-1]))
        numbers, images = self._stream.found_at(np.asarray(positions, np.int64))
        chunks = {number: self._stream.chunk(number) for number in np.unique(numbers).tolist()}
        early = {number for number, chunk in chunks.items() if not self._is_waited_for(chunk)}
        singly = self._files.read_many(
            [row for row, number in zip(rows, numbers.tolist(), strict=True) if number in early]
        )
        for row, number, image in zip(rows, numbers.tolist(), images.tolist(), strict=True):
            yield next(singly) if number in early else self._take(int(row), chunks[number], image)
        # The window behind them: not before, so that the first one of a training has all of the line for itself.
        self._ask_until(self._edge)

    def place_of(self, row: int) -> str:
        """Where a pair's image lies at its source, for people."""
        return self._files.place_of(row)

    def pass_by(self, position: int) -> None:
        """Remove the chunks that every process of the machine is done with, now that all are at `position`."""
        present = next(self._stream.windows_from(position, position + 1)).chunks[0]
        if present == self._passed:
            return
        self._passed = present
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            for entry in entries:
                found = _NAME.fullmatch(entry.name)
                if found and int(found[4]) == self._shares.machine and Chunk(*map(int, found.groups()[:3])) < present:
                    Path(entry).unlink(missing_ok=True)

    def close(self) -> None:
        """End the threads of this process when each is done with what it is at."""
        if self._process == os.getpid():
            self._threads.close()
        self._process = 0

    def _announce(self, first: int, last: int) -> None:
        """Have fetched the windows with the samples from `first` to `last`."""
        if self._process != os.getpid():
            self._process, self._threads = os.getpid(), Threads(self._requests, "spool")
            self._ahead, self._edge = self._stream.windows_from(first, self.until), first
            self._next = next(self._ahead, None)
            here = self._stream.chunk(int(self._stream.chunks_at(np.array([first]))[0]))
            _, self._begun = self._stream.span(here.number, here.window)
        self._ask_until(last)
        if self._edge <= last and self._next:
            self._edge = self._next.begin

    def _ask_until(self, position: int) -> None:
        """Hand over to the threads what they have not been asked for, up to the window that holds a position."""
        while self._next and self._next.begin <= position:
            for chunk in self._next.chunks:
                if chunk.slot in self._wanted(chunk.number, chunk.window):
                    self._threads.submit(partial(self._fetch_ahead, chunk))
            self._next = next(self._ahead, None)

    def _fetch_ahead(self, chunk: Chunk) -> None:
        try:
            self._fetch(chunk, wait=False)
        except ModeError as error:  # who needs it meets it again, and says so
            log.debug("%s: not fetched ahead: %s", self._path(chunk), error)

    def _is_waited_for(self, chunk: Chunk) -> bool:
        """Whether images of a chunk are taken out of it, though it may have to come first."""
        return self._stream.span(chunk.number, chunk.window)[0] >= self._begun or self._path(chunk).exists()

    def _take(self, row: int, chunk: Chunk, image: int) -> bytes | OSError:
        """The image of a pair from its chunk; what is not right there is asked of the source."""
        layout = self._layout(chunk)
        number = int(np.searchsorted(layout.images, image))
        if number < len(layout.images) and layout.images[number] == image:
            begin, end = layout.begins[number : number + 2].tolist()
            content = self._open(chunk).read(end - begin, begin)
            header = end - begin - int(layout.located.length[number])
            encoded = content[header:]
            if len(content) == end - begin and is_same(int(layout.located.check[number]), content[:header], encoded):
                return encoded
        [found] = self._files.read_many([row])
        return found

    def _fetched(self, chunk: Chunk) -> LocalFile:
        """The file of a chunk, fetched if it is not there."""
        while True:
            self._fetch(chunk, wait=True)
            with suppress(FileNotFoundError):  # removed just now
                file = LocalFile(self._path(chunk))
                if file.size == self._layout(chunk).begins[-1]:
                    return file
                self._path(chunk).unlink()

    def _fetch(self, chunk: Chunk, wait: bool) -> None:
        """See to it that a chunk is there; without `wait`, what another one is fetching is left to that one."""
        path = self._path(chunk)
        if path.exists():
            return
        aside = path.with_name(f"{path.name}.part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(aside, wait) as file:
                if file is None:
                    return
                if path.exists():
                    aside.unlink(missing_ok=True)
                    return
                file.truncate(0)
                for content in read_near(self._files, self._layout(chunk).located):
                    file.write(content)
                file.flush()
                aside.replace(path)
        except FileNotFoundError:
            pass  # another one has thought that everyone is done with it
        except OSError as error:
            advice = "make room there, as much as machine.spool_mb says"
            raise ModeError(f"{path}: cannot be written: {error.strerror or error}", advice) from None

    def _wanted_in(self, number: int, window: int) -> dict[int, NDArray[np.int64]]:
        """The images of a window that this machine takes, by the slot of their chunk; ascending, each once."""
        positions = self._shares.here(*self._stream.span(number, window))
        if not len(positions):
            return {}
        chunks, images = self._stream.found_at(positions)
        order = np.argsort(chunks, kind="stable")
        numbers, firsts = np.unique(chunks[order], return_index=True)
        parts = np.split(images[order], firsts[1:])
        return {self._stream.chunk(of).slot: np.unique(part) for of, part in zip(numbers.tolist(), parts, strict=True)}

    def _layout_of(self, chunk: Chunk) -> _Layout:
        images = self._wanted(chunk.number, chunk.window).get(chunk.slot, np.empty(0, np.int64))
        located = self._files.locate(self._stream.first_rows(images))
        first, last = bounds(located)
        return _Layout(images, located, np.concatenate([[0], np.cumsum(last - first)]))

    def _path(self, chunk: Chunk) -> Path:
        return self._folder / "-".join(map(str, (*chunk, self._shares.machine)))


def room_for(pairs: Pairs, files: ImageFiles, stream: PairStream, samples_ahead: int) -> int:
    """Bytes that a spool takes at most: those of its largest chunks, of so many as may be there at once.

    Args:
        pairs: of the training, whose images it holds.
        files: where they lie.
        stream: of these pairs.
        samples_ahead: positions between the sample that is trained on and the last one that is read.
    """
    windows, sizes, rest = stream.windows, [np.zeros(1, np.int64)], np.empty(0, np.int64)
    for first in blocks_of(pairs.first):
        located = files.locate(pairs.rows[first[first < len(pairs)]])
        rest = np.concatenate([rest, located.length.astype(np.int64) + HEADER])
        whole = len(rest) // CHUNK * CHUNK
        sizes.append(rest[:whole].reshape(-1, CHUNK).sum(axis=1))
        rest = rest[whole:]
    largest = np.sort(np.append(np.concatenate(sizes), rest.sum()))[::-1]
    per_window = windows.slots_per_window
    # Windows in which there are samples that are read and not yet trained on, and the one behind them.
    count = (-(-samples_ahead // (per_window * CHUNK)) + 2) * per_window
    return int(largest[:count].sum()) * -(-count // max(len(largest), 1))


def check_room(need: int, spool_mb: int, folder: Path, shuffle_images: int) -> None:
    """Refuse a spool that takes more than it may, or than there is."""
    what = f"training.read: sequential keeps up to {-(-need // 2**20):,} MiB of images in {folder}"
    if need > spool_mb * 2**20:
        advice = f"a larger machine.spool_mb, or a smaller training.shuffle_images than {shuffle_images:,}"
        raise ModeError(f"{what}, but machine.spool_mb is {spool_mb:,}", advice)
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if need > (free := shutil.disk_usage(there).free):
        raise ModeError(f"{what}, but {free // 2**20:,} MiB are free there", "make room and run it again")


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[BinaryIO | None]:
    """A file to write to, made if it is not there, that nobody else writes to; None where another one does."""
    while True:
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
                return
            except OSError:  # a file system without locks: two may fetch the same
                pass
            if _is_at(path, file):  # who held it before may have moved it into its place
                yield file
                return


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
