"""A csv, tsv or parquet table of (image path, caption) to pairs; the images are files of their own."""

from __future__ import annotations

import csv
import stat
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TextIO

from mode.data.shards.bounded import iter_rows, texts
from mode.data.shards.identity import TAIL, check_of
from mode.data.shards.manifest import SEPARATORS, Manifest, header_of, open_table
from mode.data.shards.scan import (
    CAPTION_WITHOUT_IMAGE,
    DUPLICATE_KEY,
    IMAGE_SUFFIXES,
    IMAGE_WITHOUT_CAPTION,
    LARGEST_IMAGE,
    UNDECODABLE_IMAGE,
    Scan,
    clean_caption,
    image_fault,
)
from mode.parallel import ordered_map

#: Images that one call of a worker looks at.
BLOCK = 512
#: Lines and characters of one row: a quotation mark that is never closed makes a row of all that follows.
_MOST_LINES, _LONGEST_LINE = 100, 2**17


def scan_table(manifest: Manifest, root: Path, check_images: bool, workers: int) -> Scan:
    """Find the pairs of a table.

    A row is a pair; rows that name the same image are captions of one image, in the table's order. Image paths are
    absolute or relative to the table's folder.

    Args:
        manifest: of kind `table`.
        root: the project folder.
        check_images: decode every image.
        workers: processes that do so.

    Returns:
        The pairs, ordered by image (by first appearance) and caption.

    Raises:
        ModeError: a parquet file that is damaged, or unpacks to far more than tables do; a csv whose header cannot be
            read.
    """
    table = manifest.shards[0].path
    scan = Scan(table, [], (root / table).stat().st_size)
    grouped: dict[str, dict[str, None]] = {}  # captions of each image, in order, each once
    for image, text in _rows(root / table, manifest, scan):
        if not image:
            scan.skip("", CAPTION_WITHOUT_IMAGE, "no image path")
            continue
        if not _is_path(image):
            scan.skip(image[:1000], CAPTION_WITHOUT_IMAGE, "the path is no text that a file may be called by")
            continue
        caption = clean_caption(text)
        of_image = grouped.setdefault(image, {})
        if caption and caption in of_image:
            scan.skip(image, DUPLICATE_KEY, "the same caption again")
        elif kept := scan.good_captions(image, [caption]):
            of_image[kept[0]] = None

    folder, images = Path(table).parent, list(grouped)
    look = partial(_look_at, folder=root / folder, check_images=check_images)
    blocks = [images[start : start + BLOCK] for start in range(0, len(images), BLOCK)]
    found = ordered_map(look, blocks, min(workers, len(blocks)))
    for image, look_at in zip(grouped, chain.from_iterable(found), strict=True):
        if look_at.kind:
            scan.skip(image, look_at.kind, look_at.fault)
        elif grouped[image]:
            scan.add(image, 0, look_at.size, list(grouped[image]), look_at.check)
            scan.files.append(str(folder / image))
    return scan


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


def _look_at(images: list[str], folder: Path, check_images: bool) -> list[_Look]:
    return [_look_at_one(folder / image, check_images) for image in images]


def _look_at_one(path: Path, check_images: bool) -> _Look:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a device has no end, a pipe makes wait
            return _Look(0, CAPTION_WITHOUT_IMAGE, "not a file")
        size = status.st_size
        content = path.read_bytes() if check_images and size <= LARGEST_IMAGE else None
        with path.open("rb") as file:
            file.seek(max(size - TAIL, 0))
            check = check_of(file.read(TAIL))
    except OSError as error:
        return _Look(0, CAPTION_WITHOUT_IMAGE, error.strerror or "cannot be read")
    if fault := image_fault(size, content):
        return _Look(size, UNDECODABLE_IMAGE, fault)
    return _Look(size, check=check)
