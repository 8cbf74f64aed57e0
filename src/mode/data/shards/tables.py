"""A csv, tsv or parquet table of (image path, caption) to pairs; the images are files of their own.

Rows of an image may lie anywhere in the table. They are brought together on the disk, so that memory does not grow with
the table.
"""

from __future__ import annotations

import csv
import os
import shutil
import sqlite3
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TextIO

from mode.data.shards.bounded import iter_rows, texts
from mode.data.shards.identity import TAIL, check_of, unchanged
from mode.data.shards.manifest import SEPARATORS, Manifest, header_of, open_table
from mode.data.shards.scan import (
    CAPTION_WITHOUT_IMAGE,
    DUPLICATE_KEY,
    IMAGE_SUFFIXES,
    IMAGE_WITHOUT_CAPTION,
    LARGEST_IMAGE,
    MOST_CAPTIONS,
    UNDECODABLE_IMAGE,
    Scan,
    clean_caption,
    image_fault,
)
from mode.errors import ModeError
from mode.parallel import ordered_map
from mode.progress import Progress

#: Images that one call of a worker looks at, and rows that are read or skipped together.
BLOCK = 512
#: Of the database that brings rows together: what it keeps in memory, in KiB. The rest is in a file that has no name
#: and goes with the process, where SQLite has its temporary files (SQLITE_TMPDIR, TMPDIR, /var/tmp).
_CACHE = 32 * 1024
#: Lines and characters of one row: a quotation mark that is never closed makes a row of all that follows.
_MOST_LINES, _LONGEST_LINE = 100, 2**17


def scan_table(manifest: Manifest, root: Path, check_images: bool, workers: int) -> Iterator[Scan]:
    """Find the pairs of a table.

    A row is a pair; rows that name the same image are captions of one image, in the table's order. Image paths are
    absolute or relative to the table's folder.

    Args:
        manifest: of kind `table`.
        root: the project folder.
        check_images: decode every image.
        workers: processes that do so.

    Yields:
        A part of the pairs at a time, ordered by image (by first appearance) and caption; what is wrong with rows comes
        before what is wrong with images.

    Raises:
        ModeError: a parquet file that is damaged, or unpacks to far more than tables do; a csv whose header cannot be
            read; the table changes meanwhile; no room for the temporary file.
    """
    table = manifest.shards[0].path
    with _Database(table) as database:
        with unchanged(table, root) as found, Progress(f"read {table}", unit="rows") as bar:
            scan = Scan(table, [], found.size, found)
            rows = _good_rows(_rows(root / table, manifest, scan), scan)
            while some := list(islice(rows, BLOCK)):
                database.add(some)
                bar.update(len(some))
                if len(scan.problems) >= BLOCK:
                    yield _taken(scan)
            yield _taken(scan)
        folder, images = Path(table).parent, database.count_images()
        look = partial(_look_at, folder=root / folder, check_images=check_images)
        with Progress(f"index {table}", total=images, unit="images") as bar:
            for some_images, looks in _with_looks(look, database.images(), min(workers, -(-images // BLOCK))):
                yield from _account(Scan(table, [], 0, found), folder, some_images, looks)
                bar.update(len(some_images))


def _good_rows(rows: Iterable[tuple[str, str | None]], scan: Scan) -> Iterator[tuple[str, str | None]]:
    """(image, caption) of rows that name an image; the caption is None where it is noted as one that cannot be used."""
    for image, text in rows:
        if not image:
            scan.skip("", CAPTION_WITHOUT_IMAGE, "no image path")
        elif not _is_path(image):
            scan.skip(image[:1000], CAPTION_WITHOUT_IMAGE, "the path is no text that a file may be called by")
        else:
            kept = scan.good_captions(image, [clean_caption(text)])
            yield image, kept[0] if kept else None


@dataclass
class _Image:
    """An image that a table names.

    Attributes:
        path: as the table gives it.
        captions: that can be used, in order, each once (a dict as an ordered set); those beyond `MOST_CAPTIONS` are
            counted in `more`.
        repeats: rows with a caption that the image has already.
    """

    path: str
    captions: dict[str, None] = field(default_factory=dict)
    more: int = 0
    repeats: int = 0

    def add(self, caption: str) -> None:
        """One more row with a caption."""
        if caption in self.captions:
            self.repeats += 1
        elif len(self.captions) == MOST_CAPTIONS:
            self.more += 1
        else:
            self.captions[caption] = None


class _Database:
    """Rows of a table, to be had again image by image. SQLite sorts on the disk what does not fit into memory.

    Used in a `with`, whose end makes an error of the database, such as a full disk, a `ModeError` that names the table.
    """

    def __init__(self, table: str) -> None:
        self._table = table
        self._connection = sqlite3.connect("", isolation_level=None)
        for setting in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{_CACHE}"):
            self._connection.execute(f"PRAGMA {setting}")
        self._connection.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, image TEXT, caption TEXT)")

    def add(self, rows: Sequence[tuple[str, str | None]]) -> None:
        """Add rows (image, caption) in the table's order."""
        self._connection.execute("BEGIN")
        self._connection.executemany("INSERT INTO rows (image, caption) VALUES (?, ?)", rows)
        self._connection.execute("COMMIT")

    def count_images(self) -> int:
        """Different images."""
        [(count,)] = self._connection.execute("SELECT count(DISTINCT image) FROM rows")
        return int(count)

    def images(self) -> Iterator[_Image]:
        """Every image with its captions, by first appearance."""
        by_image = (
            "SELECT image, caption, min(number) OVER (PARTITION BY image) AS first FROM rows ORDER BY first, number"
        )
        for _, rows in groupby(self._connection.execute(by_image), itemgetter(2)):
            path, caption, _ = next(rows)
            image = _Image(path)
            for each in chain([caption], (caption for _, caption, _ in rows)):
                if each is not None:
                    image.add(each)
            yield image

    def __enter__(self) -> _Database:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._connection.close()
        if isinstance(error, sqlite3.Error):
            folder = next(filter(None, map(os.environ.get, ("SQLITE_TMPDIR", "TMPDIR"))), "/var/tmp")
            free = shutil.disk_usage(folder).free
            raise ModeError(
                f"{self._table}: its rows cannot be sorted in {folder}: {error}: {free:,} bytes are free",
                "make room there, or name another folder in TMPDIR; it takes up to three times the table's text",
            ) from None


def _is_path(image: str) -> bool:
    """Whether a text can be a file's path here, and stand in the index."""
    try:
        return b"\0" not in image.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8
        return False


def _rows(path: Path, manifest: Manifest, scan: Scan) -> Iterator[tuple[str, str | None]]:
    """(image path, caption) of each row; rows of a csv that do not fit its header go to quarantine."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, manifest)
        return
    separator = SEPARATORS[path.suffix]
    with open_table(path) as file:
        lines = _Lines(file)
        header = header_of(lines, separator, path)
        image, caption = header.index(manifest.image_column), header.index(manifest.caption_column)
        while line := next(lines, ""):
            number = lines.number
            row, fault = _row_of(line, lines, separator, len(header), image)
            if fault:
                scan.skip(line.split(separator)[0].strip()[:1000], IMAGE_WITHOUT_CAPTION, f"line {number}: {fault}")
            elif row:
                yield row[image].strip(), row[caption]


class _Lines:
    """Lines of a file one after the other, which can be given back; `number` is that of the last one, from 1."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._back: list[str] = []  # the next line is the last
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._back.pop() if self._back else self._read()
        if not line:
            raise StopIteration
        self.number += 1
        return line

    def give_back(self, lines: Sequence[str]) -> None:
        """The last lines given are the next ones again."""
        self._back += reversed(lines)
        self.number -= len(lines)

    def _read(self) -> str:
        line = part = self._file.readline(_LONGEST_LINE + 2)
        while len(part) == _LONGEST_LINE + 2 and not part.endswith(("\n", "\r")):  # the rest of a long one is let go
            part = self._file.readline(_LONGEST_LINE + 2)
        return line


def _row_of(line: str, lines: _Lines, separator: str, fields: int, image: int) -> tuple[list[str], str]:
    """The row that begins with a line, or what is wrong with it; then the next row begins on the next line.

    A caption may have line breaks within quotation marks. A mark that nothing closes would swallow the rows that
    follow, as far as the next mark: such a row does not end where csv says that it has to, or a line of it is a row.
    """
    taken: list[str] = []

    def feed() -> Iterator[str]:
        for each in chain([line], lines):
            taken.append(each)
            if len(taken) > _MOST_LINES:
                raise csv.Error(f"a quotation mark is not closed within {_MOST_LINES} lines")
            if len(each) > _LONGEST_LINE:
                raise csv.Error(f"longer than {_LONGEST_LINE:,} characters")
            yield each

    try:
        if '"' not in line and len(line) <= _LONGEST_LINE:  # as csv reads it, but at once
            row = line.rstrip("\r\n").split(separator) if line.strip("\r\n") else []
        else:
            row = next(csv.reader(feed(), delimiter=separator), [])
        if len(taken) > 1:
            next(csv.reader(iter(taken), delimiter=separator, strict=True))
            if any(_is_row(line, separator, fields, image) for line in taken[1:]):
                raise csv.Error("a quotation mark is not closed")
    except csv.Error as error:
        lines.give_back(taken[1:])
        return [], str(error)
    if row and len(row) != fields:
        lines.give_back(taken[1:])
        return [], f"{len(row)} fields, the header has {fields}"
    return row, ""


def _is_row(line: str, separator: str, fields: int, image: int) -> bool:
    """Whether a line within quotation marks is a row by itself: as many fields, an image's name where it belongs."""
    parts = line.rstrip("\r\n").split(separator)
    return len(parts) >= fields and parts[image].strip(' "').lower().endswith(IMAGE_SUFFIXES)


def _parquet_rows(path: Path, manifest: Manifest) -> Iterator[tuple[str, str | None]]:
    for image, caption in iter_rows(path, str(path), [manifest.image_column, manifest.caption_column], texts):
        yield (image or "").strip(), caption


class _Look(NamedTuple):
    """What an image file is: size in bytes, kind of problem or "", detail, and its check (see `identity`)."""

    size: int
    kind: str = ""
    fault: str = ""
    check: int = 0


def _with_looks(
    look: Callable[[list[str]], list[_Look]], images: Iterator[_Image], workers: int
) -> Iterator[tuple[list[_Image], list[_Look]]]:
    """Blocks of images, with what was found in the place of each."""
    waiting: deque[list[_Image]] = deque()  # workers are some blocks ahead

    def paths() -> Iterator[list[str]]:
        while some := list(islice(images, BLOCK)):
            waiting.append(some)
            yield [image.path for image in some]

    for looks in ordered_map(look, paths(), workers):
        yield waiting.popleft(), looks


def _account(scan: Scan, folder: Path, images: Sequence[_Image], looks: Sequence[_Look]) -> Iterator[Scan]:
    """Enter images, or why they are none; in more than one part where an image has very many rows."""
    for image, found in zip(images, looks, strict=True):
        for _ in range(image.repeats):
            scan.skip(image.path, DUPLICATE_KEY, "the same caption again")
            if len(scan.problems) >= BLOCK:
                yield _taken(scan)
        if found.kind:
            scan.skip(image.path, found.kind, found.fault)
        elif image.captions:
            if image.more:
                scan.skip_too_many(image.path, MOST_CAPTIONS + image.more)
            scan.add(image.path, 0, found.size, list(image.captions), found.check)
            scan.files.append(str(folder / image.path))
    yield _taken(scan)


def _taken(scan: Scan) -> Scan:
    """What has been entered so far, which `scan` then has no more."""
    part = replace(scan)
    fresh = Scan(scan.path, [], 0, scan.found)
    for each in fields(Scan):
        setattr(scan, each.name, getattr(fresh, each.name))
    return part


def _look_at(images: list[str], folder: Path, check_images: bool) -> list[_Look]:
    return [_look_at_one(folder / image, check_images) for image in images]


def _look_at_one(path: Path, check_images: bool) -> _Look:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a device has no end, a pipe makes wait
            return _Look(0, CAPTION_WITHOUT_IMAGE, "not a file")
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            size = before.st_size
            content = file.read(size) if check_images and size <= LARGEST_IMAGE else None
            file.seek(max(size - TAIL, 0))
            check = check_of(file.read(TAIL))
            after = os.fstat(file.fileno())
    except OSError as error:
        return _Look(0, CAPTION_WITHOUT_IMAGE, error.strerror or "cannot be read")
    if (after.st_size, after.st_mtime_ns) != (size, before.st_mtime_ns):
        return _Look(size, UNDECODABLE_IMAGE, "changed while it was read")
    if fault := image_fault(size, content):
        return _Look(size, UNDECODABLE_IMAGE, fault)
    return _Look(size, check=check)
