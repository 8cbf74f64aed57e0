"""A csv, tsv or parquet table of (image path, caption) to pairs; the images are files of their own."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pyarrow import parquet

from mode.data.images import UndecodableImage, decode
from mode.data.shards.manifest import SEPARATORS, Manifest
from mode.data.shards.scan import (
    CAPTION_WITHOUT_IMAGE,
    DUPLICATE_KEY,
    EMPTY_CAPTION,
    IMAGE_WITHOUT_CAPTION,
    UNDECODABLE_IMAGE,
    Scan,
    clean_caption,
)
from mode.errors import ModeError
from mode.parallel import ordered_map

#: Images that one call of a worker looks at.
BLOCK = 512


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
        ModeError: the table cannot be parsed.
    """
    table = manifest.shards[0].path
    scan = Scan(table, [], (root / table).stat().st_size)
    grouped: dict[str, dict[str, None]] = {}  # captions of each image, in order, each once
    for image, text in _rows(root / table, manifest, scan):
        caption = clean_caption(text)
        if not image:
            scan.skip("", CAPTION_WITHOUT_IMAGE, "no image path")
            continue
        of_image = grouped.setdefault(image, {})
        if not caption:
            scan.skip(image, EMPTY_CAPTION)
        elif caption in of_image:
            scan.skip(image, DUPLICATE_KEY, "the same caption again")
        else:
            of_image[caption] = None

    folder, images = Path(table).parent, list(grouped)
    look = partial(_look_at, folder=root / folder, check_images=check_images)
    blocks = [images[start : start + BLOCK] for start in range(0, len(images), BLOCK)]
    found = ordered_map(look, blocks, min(workers, len(blocks)))
    for image, (size, kind, fault) in zip(grouped, (each for block in found for each in block), strict=True):
        if kind:
            scan.skip(image, kind, fault)
        elif grouped[image]:
            scan.add(image, 0, size, list(grouped[image]))
            scan.files.append(str(folder / image))
    return scan


def _rows(path: Path, manifest: Manifest, scan: Scan) -> Iterator[tuple[str, str | None]]:
    """(image path, caption) of each row; rows of a csv that do not fit its header go to quarantine."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, manifest)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=SEPARATORS[path.suffix])
            header = next(reader)
            image, caption = header.index(manifest.image_column), header.index(manifest.caption_column)
            for row in reader:
                if len(row) == len(header):
                    yield row[image].strip(), row[caption]
                elif row:  # an unquoted separator in the caption, most likely
                    fault = f"line {reader.line_num}: {len(row)} fields, the header has {len(header)}"
                    scan.skip(row[0], IMAGE_WITHOUT_CAPTION, fault)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ModeError(f"{path}: line {reader.line_num + 1} cannot be read: {error}") from None


def _parquet_rows(path: Path, manifest: Manifest) -> Iterator[tuple[str, str | None]]:
    columns = [manifest.image_column, manifest.caption_column]
    with parquet.ParquetFile(path) as file:
        for block in file.iter_batches(columns=columns):
            for image, caption in zip(*(block.column(name).to_pylist() for name in columns), strict=True):
                yield str(image or "").strip(), caption


def _look_at(images: list[str], folder: Path, check_images: bool) -> list[tuple[int, str, str]]:
    """(size in bytes, kind of problem or "", detail) of each image file."""
    return [_look_at_one(folder / image, check_images) for image in images]


def _look_at_one(path: Path, check_images: bool) -> tuple[int, str, str]:
    try:
        size = path.stat().st_size
        content = path.read_bytes() if check_images else None
    except OSError as error:
        return 0, CAPTION_WITHOUT_IMAGE, error.strerror or "cannot be read"
    if not size:
        return 0, UNDECODABLE_IMAGE, "0 bytes"
    if content is not None:
        try:
            decode(content)
        except UndecodableImage as error:
            return size, UNDECODABLE_IMAGE, str(error)
    return size, "", ""
