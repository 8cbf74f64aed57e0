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
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

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
        ModeError: the folder is not empty and holds another export or other files; a shard is not the one indexed.
        OSError: a shard is gone.
    """
    selection = hashlib.sha256()
    for array in (rows, index.file[rows], index.offset[rows], index.length[rows]):
        selection.update(np.ascontiguousarray(array).data)
    size = {"pairs": len(rows), "pairs_per_shard": pairs_per_shard}
    record = {**about, **size, "selection": selection.hexdigest()}
    _prepare(out, record, force)
    starts = range(0, len(rows), pairs_per_shard)
    shards = {out / f"{number:05d}.tar": rows[start:][:pairs_per_shard] for number, start in enumerate(starts)}
    missing = {path: chosen for path, chosen in shards.items() if not path.is_file()}
    images = ImageFiles(index, root)
    captions = _captions(index, chain.from_iterable(missing.values()))
    done = len(rows) - sum(map(len, missing.values()))
    with Progress(f"export to {out}", total=len(rows), unit="pairs", done=done) as bar:
        for path, chosen in missing.items():
            with write_aside(path) as aside, tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
                for row in chosen.tolist():
                    content = images.read(row)
                    origin = {
                        "pair": row,
                        "image": int(index.image[row]),
                        "shard": index.path(index.file[row]),
                        **{name: values[row].item() for name, values in columns.items()},
                    }
                    key = f"{row:010d}"
                    add_to_tar(tar, f"{key}.{_suffix(content)}", content)
                    add_to_tar(tar, f"{key}.txt", next(captions).encode())
                    add_to_tar(tar, f"{key}.json", json.dumps(origin).encode())
                    tar.members.clear()  # type: ignore[attr-defined]  # it keeps every header otherwise
                    bar.update()
    return len(shards)


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
        raise ModeError(f"{out}: not a folder")
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


def _captions(index: PairIndex, rows: Iterable[int]) -> Iterator[str]:
    """Captions of ascending rows, read once from the disk as one goes."""
    blocks = index.iter_captions(BLOCK)
    block: list[str] = []
    first = 0
    for row in rows:
        while row >= first + len(block):
            first += len(block)
            block = next(blocks)
        yield block[row - first]
