"""Pairs of an index as webdataset tars, for any other trainer.

A sample is one pair: `KEY.jpg` (or png, webp: the original bytes), `KEY.txt` with the caption, and `KEY.json` with
where it came from. KEY is the row of the index, so that samples of several exports can be told apart. An image with
several of the chosen captions is written once for each: other trainers read one caption a sample. `image` in the json
is the same number for all of them.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mode.data.shards.index import PairIndex
from mode.data.shards.reading import ImageFiles
from mode.errors import ModeError
from mode.files import write_aside
from mode.progress import Progress

#: Beside the tars: what was exported, so that an interrupted export can go on.
RECORD = "export.json"
_TAR = re.compile(r"\d{5,}\.tar")
#: Rows whose captions are read together.
BLOCK = 65_536


def export_pairs(
    index: PairIndex,
    rows: NDArray[np.int64],
    root: Path,
    out: Path,
    columns: dict[str, NDArray[Any]],
    about: dict[str, object],
    pairs_per_shard: int = 10_000,
    force: bool = False,
) -> int:
    """Write pairs as numbered tars, `00000.tar` ..., each as a whole or not at all.

    Memory holds one image at a time. An interrupted call goes on with the tars that are missing if it is made again
    with the same arguments.

    Args:
        index: the source.
        rows: int64, ascending, rows of the index.
        root: folder that relative paths of the index start from.
        out: the folder to write.
        columns: arrays [pairs of the index] whose values are noted in each json, such as `fine` and `coarse`.
        about: what is exported, for people; kept in `export.json` and compared when an export goes on.
        pairs_per_shard: the last tar may hold fewer.
        force: replace an older export, or write beside files that are no tars of an export.

    Returns:
        Tars of the export.

    Raises:
        ModeError: the folder is not empty and holds another export or other files.
        OSError: an image is not where the index says.
    """
    record = {
        **about,
        "pairs": len(rows),
        "pairs_per_shard": pairs_per_shard,
        "selection": _digest(rows, index.file[rows], index.offset[rows], index.length[rows]),
    }
    _prepare(out, record, force)
    shards = -(-len(rows) // pairs_per_shard)
    starts = [number * pairs_per_shard for number in range(shards) if not (out / _name(number)).is_file()]
    images = ImageFiles(index, root)
    done = len(rows) - sum(min(pairs_per_shard, len(rows) - start) for start in starts)
    with Progress(f"export to {out}", total=len(rows), unit="pairs", done=done) as bar:
        captions = _Captions(index)
        for start in starts:
            with (
                write_aside(out / _name(start // pairs_per_shard)) as aside,
                tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar,
            ):
                for row, caption in captions.of(rows[start : start + pairs_per_shard]):
                    content = images.read(row)
                    origin = {
                        "pair": row,
                        "image": int(index.image[row]),
                        "shard": index.path(index.file[row]),
                        **{name: values[row].item() for name, values in columns.items()},
                    }
                    key = f"{row:010d}"
                    _add(tar, f"{key}.{image_suffix(content)}", content)
                    _add(tar, f"{key}.txt", caption.encode())
                    _add(tar, f"{key}.json", json.dumps(origin).encode())
                    tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header otherwise
                    bar.update()
    return shards


def image_suffix(content: bytes) -> str:
    """`jpg`, `png` or `webp` by the first bytes; `jpg` for anything else, which decoders look into anyway.

    Example:
        >>> image_suffix(bytes.fromhex("89504e470d0a1a0a"))
        'png'
    """
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "webp"
    return "jpg"


def _prepare(out: Path, record: dict[str, object], force: bool) -> None:
    """The folder, with the record of this export, and no tar of another."""
    if out.exists() and not out.is_dir():
        raise ModeError(f"{out}: not a folder")
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    before = _read_record(out / RECORD)
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


def _digest(*arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _read_record(path: Path) -> dict[str, object] | None:
    try:
        record: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return record


def _name(number: int) -> str:
    return f"{number:05d}.tar"


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # time 0, no owner: the same pairs give the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


class _Captions:
    """Captions of ascending rows, read once from the disk as one goes."""

    def __init__(self, index: PairIndex) -> None:
        self._blocks = index.iter_captions(BLOCK)
        self._block: list[str] = []
        self._first = 0

    def of(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, str]]:
        """(row, caption); rows that are asked for later must be higher."""
        for row in map(int, rows):
            while row >= self._first + len(self._block):
                self._first += len(self._block)
                self._block = next(self._blocks)
            yield row, self._block[row - self._first]
