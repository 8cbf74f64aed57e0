"""Pairs of an index as webdataset tars, for any other trainer.

A sample is one pair: `KEY.jpg` (or png, webp: the original bytes), `KEY.txt` with the caption, and `KEY.json` with
where it came from. KEY is the row of the index, so that samples of several exports can be told apart. An image with
several of the chosen captions is written once for each: other trainers read one caption a sample. `image` in the json
is the same number for all of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mode.data.shards.index import PairIndex
from mode.data.shards.reading import ImageFiles
from mode.errors import ModeError
from mode.files import add_to_tar, write_aside
from mode.progress import Progress

#: Beside the tars: what was exported, so that an interrupted export can go on.
RECORD = "export.json"
_TAR = re.compile(r"\d{5,}\.tar")


class Chosen(NamedTuple):
    """Some of the pairs to export.

    Attributes:
        rows: int64, ascending rows of the index, beyond those of the block before.
        noted: arrays of as many values that are noted in each json, such as `fine` and `coarse`.
    """

    rows: NDArray[np.int64]
    noted: Mapping[str, NDArray[Any]]


def export_pairs(
    index: PairIndex,
    chosen: Callable[[], Iterable[Chosen]],
    root: Path,
    out: Path,
    about: dict[str, object],
    pairs_per_shard: int = 10_000,
    force: bool = False,
) -> tuple[int, int]:
    """Write pairs as numbered tars, `00000.tar` ..., each as a whole or not at all.

    Memory holds one image and one block of pairs at a time. An interrupted call goes on with the tars that are missing
    if it is made again with the same arguments.

    Args:
        index: the source.
        chosen: gives the pairs, in blocks; it is called twice.
        root: folder that relative paths of the index start from.
        out: the folder to write.
        about: what is exported, for people; kept in `export.json` and compared when an export goes on.
        pairs_per_shard: the last tar may hold fewer.
        force: replace an older export, or write beside files that are no tars of an export.

    Returns:
        Pairs and tars of the export.

    Raises:
        ModeError: the folder is not empty and holds another export or other files; a shard is not the one indexed.
        OSError: a shard is gone.
    """
    pairs, selection = 0, hashlib.sha256()
    for rows, _ in chosen():
        for array in (rows, index.file[rows], index.offset[rows], index.length[rows]):
            selection.update(np.ascontiguousarray(array).data)
        pairs += len(rows)
    record = {**about, "pairs": pairs, "pairs_per_shard": pairs_per_shard, "selection": selection.hexdigest()}
    _prepare(out, record, force)
    images, samples = ImageFiles(index, root), _samples(index, chosen())
    with Progress(f"export to {out}", total=pairs, unit="pairs") as bar:
        for start in range(0, pairs, pairs_per_shard):
            path = out / f"{start // pairs_per_shard:05d}.tar"
            of_tar = islice(samples, pairs_per_shard)
            if path.is_file():
                bar.update(sum(1 for _ in of_tar))
                continue
            written: list[int] = []
            with write_aside(path) as aside, tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
                for row, caption, origin in of_tar:
                    add_sample(tar, f"{row:010d}", images.read(row), caption, origin)
                    written.append(row)
                    bar.update()
                images.check(written)
    return pairs, -(-pairs // pairs_per_shard)


def _samples(index: PairIndex, chosen: Iterable[Chosen]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Row, caption and what is noted of each pair."""
    for rows, noted in chosen:
        columns = {"pair": rows, "image": index.image[rows], **noted}
        files = index.file[rows].tolist()
        for place, (row, caption) in enumerate(zip(rows.tolist(), index.captions(rows), strict=True)):
            values = {name: values[place].item() for name, values in columns.items()}
            yield row, caption, {**values, "shard": index.path(files[place])}


def add_sample(tar: tarfile.TarFile, key: str, image: bytes, caption: str, origin: Mapping[str, object]) -> None:
    """Append `KEY.jpg` (or png, webp), `KEY.txt` and `KEY.json` to a tar that is being written."""
    add_to_tar(tar, f"{key}.{_suffix(image)}", image)
    add_to_tar(tar, f"{key}.txt", caption.encode())
    add_to_tar(tar, f"{key}.json", json.dumps(origin).encode())
    tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header otherwise


def _suffix(content: bytes) -> str:
    """`jpg`, `png` or `webp` by the first bytes; `jpg` for anything else, which decoders look into anyway."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "webp"
    return "jpg"


def _prepare(out: Path, record: dict[str, object], force: bool) -> None:
    """The folder, with the record of this export, and no tar of another."""
    if out.exists() and not out.is_dir():
        raise ModeError(f"{out}: not a folder", "name a new or empty one")
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    try:
        before = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        before = None
    if before == record:
        return
    if there and not force:
        what = "another export" if before is not None else f"not empty ({there[0]}, ...)"
        raise ModeError(f"{out}: {what}", "give another folder, or --force to replace the tars of an export in it")
    (out / RECORD).unlink(missing_ok=True)
    for name in there:
        if _TAR.fullmatch(name):
            (out / name).unlink()
    with write_aside(out / RECORD) as aside:
        aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
