"""One index of some pairs of several sources, for a training that sees all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mode.checksums import write_manifest
from mode.columns import write_columns
from mode.data.shards.index import FACTOR, FILES, IMAGES, PAIRS, PROBABILITY, PairIndex
from mode.files import write_aside
from mode.progress import Progress


def join_indexes(out: Path, parts: Sequence[tuple[PairIndex, Iterable[NDArray[np.int64]]]]) -> None:
    """Write an index of chosen pairs, one source after the other; images are numbered anew.

    Memory: one block of pairs, and of each source the list of its files.

    Args:
        out: folder to write, as a whole or not at all.
        parts: each index with ascending rows of it, in blocks.

    Raises:
        ModeError: an index is damaged.
    """
    has_probability = any(index.probability is not None for index, _ in parts)
    has_factor = any(index.factor is not None for index, _ in parts)
    schema = PAIRS.append(PROBABILITY) if has_probability else PAIRS
    files_schema = FILES.append(FACTOR) if has_factor else FILES
    pairs = images = files = 0
    with write_aside(out) as folder, ExitStack() as opened, Progress("join indexes", unit="pairs") as bar:
        folder.mkdir()
        tables = {"pairs": schema, "images": IMAGES, "files": files_schema}
        write = {name: opened.enter_context(write_columns(folder / name, each)) for name, each in tables.items()}
        for index, blocks in parts:
            last, first = -1, 0  # the image that the last pair is of, and the place of its first pair
            for rows in blocks:
                if not len(rows):
                    continue
                of = index.image[rows]
                begins = np.diff(of, prepend=last) != 0
                number = images - 1 + np.cumsum(begins)
                place = np.arange(pairs, pairs + len(rows))
                firsts = np.maximum.accumulate(np.where(begins, place, first))
                columns = [
                    files + index.file[rows],
                    index.keys(rows),
                    number,
                    place - firsts,
                    index.captions(rows),
                    index.offset[rows],
                    index.length[rows],
                    index.check[rows],
                ]
                if has_probability:
                    columns.append(np.ones(len(rows)) if index.probability is None else index.probability[rows])
                write["pairs"].write(_table(columns, schema))
                write["images"].write(_table([place[begins]], IMAGES))
                pairs, images, last, first = pairs + len(rows), int(number[-1]) + 1, int(of[-1]), int(firsts[-1])
                bar.update(len(rows))
            write["files"].write(_files_of(index, files_schema))
            files += index.file_count
        write["images"].write(_table([[pairs]], IMAGES))
        opened.close()
        write_manifest(folder)


def _files_of(index: PairIndex, schema: pa.Schema) -> pa.Table:
    known = [index.identity(file) for file in range(index.file_count)]
    sizes, samples, etags = zip(*known, strict=True) if known else ((), (), ())
    columns: list[object] = [index.files, sizes, samples, [etag or "" for etag in etags]]
    if FACTOR.name in schema.names:
        columns.append(np.ones(index.file_count) if index.factor is None else index.factor[:])
    return _table(columns, schema)


def _table(columns: Sequence[object], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(each, kind) for each, kind in zip(columns, schema.types, strict=True)], schema=schema)
