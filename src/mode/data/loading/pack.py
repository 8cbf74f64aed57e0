"""A training's images in shards of its own, in the order of the index: nothing between them that it does not want.

A pack is a folder, here or in a store, of webdataset tars `00000.tar` ...: of each image `KEY.jpg` (or png, webp: the
original bytes), `KEY.txt` with its first caption and `KEY.json` with all of its captions that the training uses
(`texts`) and where it came from. KEY is the number of the image in its source. Beside each tar lie `00000.npy`, which
says where each image is (see `PLACES`), and, written last, `00000.json` with the checksums of both, and what tells the
tar from another one: its size, the sample of its bytes (see `identity`) and, in a store that gives one, its ETag.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mode.columns import Column, Rows, Texts, open_columns, write_columns
from mode.data.loading.ranges import read_near
from mode.data.loading.selection import Pairs
from mode.data.shards.export import add_sample
from mode.data.shards.identity import HEADER, check_of, is_same, sample_of
from mode.data.shards.index import PairIndex
from mode.data.shards.places import (
    Description,
    LocalFile,
    RemoteFile,
    describe,
    filesystem_of,
    is_url,
    patiently,
    read_start,
)
from mode.data.shards.reading import ImageFiles, Located
from mode.data.shards.scan import LARGEST_IMAGE
from mode.errors import ModeError
from mode.files import sha256_of, told_of_no_room, write_aside
from mode.parallel import in_order
from mode.progress import Progress

#: What is packed: written first, and compared when an interrupted call is made again and when a training reads it.
RECORD = "pack.json"
#: Where each image of a tar is: its number in the source, and its bytes in the tar; what tells it from another one.
PLACES = np.dtype([("image", "<i8"), ("offset", "<i8"), ("length", "<i4"), ("check", "<u4")])

#: Images that are read together, and how many such parts are read ahead of the one that is written.
_PART, _AHEAD = 256, 8
#: Requests under way while a pack is opened.
_REQUESTS = 16
#: The table of a pack in a project, and of its tars.
_IMAGES = pa.schema(
    [
        ("image", pa.int64()),
        ("file", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int32()),
        ("check", pa.uint32()),
    ]
)
_TARS = pa.schema([("path", pa.string()), ("size", pa.int64()), ("sample", pa.uint32()), ("etag", pa.string())])
#: Every so many images one is kept in memory, to find the others by.
_STRIDE = 512
#: What to do about a pack that is not as it was written.
_REMEDY = "`mode pack NAME DIR --force` packs anew"
#: Largest record or note, in bytes: there are some lines in it.
_NOTE = 65_536


class Store:
    """A folder to write whole files to and read them from, on this machine or behind a URL.

    Args:
        where: path or URL.
        root: folder that a relative path starts from.
    """

    def __init__(self, where: str, root: Path) -> None:
        self.where, self._root = where.rstrip("/"), root
        self._folder = None if is_url(where) else root / where

    def path(self, name: str) -> str:
        """Path or URL of a file."""
        return f"{self.where}/{name}"

    def read(self, name: str, most: int) -> bytes | None:
        """A file of so many bytes at most; None where it is not there.

        Raises:
            ModeError: it is longer, or the store fails again and again.
        """
        try:
            if self._folder is not None:
                with (self._folder / name).open("rb") as file:
                    content = file.read(most + 1)
            else:
                content = read_start(self.path(name), most + 1)
        except FileNotFoundError:
            return None
        if len(content) > most:
            raise ModeError(f"{self.path(name)}: more than {most:,} bytes", "it is no file of a pack")
        return content

    def describe(self, name: str) -> Description:
        """What tells a file from another one. Raises FileNotFoundError where it is not there."""
        return describe(self.path(name), self._root)

    def write(self, name: str, content: bytes | Path) -> None:
        """Write a file, as a whole or not at all, or move one of this machine there."""
        if self._folder is not None:
            with write_aside(self._folder / name) as aside:
                if isinstance(content, Path):
                    shutil.copyfile(content, aside)
                else:
                    aside.write_bytes(content)
            return
        filesystem, path = filesystem_of(self.path(name))
        if isinstance(content, Path):
            patiently(self.path(name), lambda: filesystem.put_file(str(content), path))
        else:
            patiently(self.path(name), lambda: filesystem.pipe_file(path, content))

    def names(self) -> list[str]:
        """Names of what is there."""
        if self._folder is not None:
            return sorted(path.name for path in self._folder.iterdir()) if self._folder.is_dir() else []
        filesystem, path = filesystem_of(self.where)
        try:
            found = patiently(self.where, lambda: filesystem.ls(path, detail=False, refresh=True))
        except FileNotFoundError:
            return []
        return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)

    def remove(self, name: str) -> None:
        """Remove a file that is there."""
        if self._folder is not None:
            (self._folder / name).unlink()
            return
        filesystem, path = filesystem_of(self.path(name))
        patiently(self.path(name), lambda: filesystem.rm_file(path))

    def prepare(self) -> None:
        """Make the folder."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            filesystem, path = filesystem_of(self.where)
            patiently(self.where, lambda: filesystem.makedirs(path, exist_ok=True))


def write_pack(
    name: str, index: PairIndex, pairs: Pairs, root: Path, where: str, images_per_shard: int, force: bool = False
) -> tuple[int, int]:
    """Write the images of a training as a pack. Interrupted, it goes on with the tars that are missing.

    Memory: some parts of 256 images. A store gets each tar from a temporary file.

    Args:
        name: of the model, for people.
        index: of the source.
        pairs: of the training.
        root: folder that relative paths start from.
        where: folder or URL to write to.
        images_per_shard: the last tar may hold fewer.
        force: replace what is there, another pack or this one.

    Returns:
        Images and tars of the pack.

    Raises:
        ModeError: something else is there; a shard is not the one that was indexed, or is gone.
    """
    store, tars = Store(where, root), -(-pairs.images // images_per_shard)
    record = {**_identity(index, pairs), "name": name, "images_per_shard": images_per_shard}
    _prepare(store, record, force)
    files = ImageFiles(index, root)
    with Progress(f"pack {name}", total=pairs.images, unit="images") as bar, ThreadPoolExecutor(_AHEAD) as threads:
        for number in range(tars):
            first = number * images_per_shard
            last = min(first + images_per_shard, pairs.images)
            if store.read(f"{number:05d}.json", _NOTE) is None:
                _write_tar(store, f"{number:05d}", index, pairs, range(first, last), files, threads, bar)
            else:
                bar.update(last - first)
    return pairs.images, tars


def _write_tar(
    store: Store,
    stem: str,
    index: PairIndex,
    pairs: Pairs,
    images: range,
    files: ImageFiles,
    threads: ThreadPoolExecutor,
    bar: Progress,
) -> None:
    """Write one tar with these images of the training (by place), then its table, then the note."""
    parts = [range(start, min(start + _PART, images.stop)) for start in range(images.start, images.stop, _PART)]
    places = np.zeros(len(images), PLACES)
    written = 0
    with tempfile.TemporaryDirectory(prefix="mode-pack-") as temporary:
        path = Path(temporary) / f"{stem}.tar"
        with (
            told_of_no_room(path),
            path.open("wb") as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            read = partial(_read_part, index, pairs, files)
            for samples in in_order(lambda part: threads.submit(read, part), parts, _AHEAD - 1):
                for image, content, origin in samples:
                    offset = tar.offset + HEADER
                    add_sample(tar, f"{image:010d}", content, origin["texts"][0], origin)
                    places[written] = image, offset, len(content), 0
                    written += 1
                    bar.update()
        with path.open("rb") as whole:
            for place in places:
                whole.seek(int(place["offset"]) - HEADER)
                header, content = whole.read(HEADER), whole.read(int(place["length"]))
                place["check"] = check_of(content, check_of(header))
        with closing(LocalFile(path)) as whole_tar:
            size, sample = whole_tar.size, sample_of(whole_tar)
        table = io.BytesIO()
        np.save(table, places, allow_pickle=False)
        sha256 = sha256_of(path)
        store.write(f"{stem}.tar", path)
    note = {
        "images": len(places),
        "bytes": size,
        "sha256": sha256,
        "sample": sample,
        "etag": store.describe(f"{stem}.tar").etag,
        "places": hashlib.sha256(table.getvalue()).hexdigest(),
    }
    store.write(f"{stem}.npy", table.getvalue())
    store.write(f"{stem}.json", json.dumps(note).encode())


def _read_part(
    index: PairIndex, pairs: Pairs, files: ImageFiles, places: range
) -> list[tuple[int, bytes, dict[str, Any]]]:
    """Number, bytes and origin of some consecutive images of a training, compared with the index."""
    first = pairs.first[places.start : places.stop + 1]
    rows = pairs.rows[int(first[0]) : int(first[-1])]
    of_image = rows[first[:-1] - first[0]]
    located, captions = files.locate(of_image), index.captions(rows)
    found = []
    columns = zip(of_image.tolist(), pairwise((first - first[0]).tolist()), read_near(files, located), strict=True)
    for number, (row, (begin, end), content) in enumerate(columns):
        header = len(content) - int(located.length[number])
        image = content[header:]
        if not is_same(int(located.check[number]), content[:header], image):
            image = files.read(row)
        origin = {
            "image": int(index.image[row]),
            "pairs": rows[begin:end].tolist(),
            "texts": captions[begin:end],
            "shard": index.path(int(located.file[number])),
        }
        found.append((int(index.image[row]), image, origin))
    return found


def _identity(index: PairIndex, pairs: Pairs) -> dict[str, Any]:
    """What a pack is of: as long as this is the same, so are the bytes of its images."""
    names = ("image.npy", "offset.npy", "length.npy", "check.npy")
    digest = hashlib.sha256("".join(index.digests(*names)).encode()).hexdigest()
    return {"index": digest, "pairs": pairs.digest, "images": pairs.images}


def _prepare(store: Store, record: dict[str, Any], force: bool) -> None:
    """The folder, with the record of this pack, and no file of another."""
    there = store.names()
    if there and not force and _json(store.read(RECORD, _NOTE) if RECORD in there else None) == record:
        return
    if there and not force:
        what = "another pack" if RECORD in there else f"not empty ({there[0]}, ...)"
        raise ModeError(f"{store.where}: {what}", "give another place, or --force to replace the tars of a pack in it")
    for name in there:
        if re.fullmatch(r"\d{5,}\.(tar|npy|json)", name) or name == RECORD:
            store.remove(name)
    store.prepare()
    store.write(RECORD, (json.dumps(record, indent=1) + "\n").encode())


def _json(content: bytes | None) -> Any:
    try:
        return None if content is None else json.loads(content)
    except (ValueError, RecursionError):
        return None


def read_record(where: str, root: Path, index: PairIndex, pairs: Pairs) -> dict[str, Any]:
    """What `fetch_table` has to know of a pack.

    Args:
        where: folder or URL of the pack.
        root: folder that a relative path starts from.
        index: of the source.
        pairs: of the training that is to read it.

    Raises:
        ModeError: it is not there, of other pairs or of another index.
    """
    record = _json(Store(where, root).read(RECORD, _NOTE))
    if not isinstance(record, dict):
        raise ModeError(f"{where}: no pack", "`mode pack NAME` makes one")
    for key, value in _identity(index, pairs).items():
        if record.get(key) != value:
            what = "another index" if key == "index" else "other pairs"
            raise ModeError(f"{where}: a pack of {what} than the training's", _REMEDY)
    return record


def fetch_table(where: str, root: Path, index: PairIndex, pairs: Pairs, record: dict[str, Any], folder: Path) -> None:
    """Bring to `folder` what `Pack` needs of a pack: where its images lie, after a look that it is all as it has to be.

    Args:
        where, root, index, pairs: as for `read_record`, which gave `record`.
        folder: to write, as a whole or not at all.

    Raises:
        ModeError: it is not complete, or damaged; a tar is not the one that was packed.
    """
    store = Store(where, root)
    per_tar = record.get("images_per_shard")
    if not isinstance(per_tar, int) or per_tar < 1:
        raise _damaged(where, RECORD)
    parts = [range(start, min(start + per_tar, pairs.images)) for start in range(0, pairs.images, per_tar)]
    with (
        write_aside(folder) as aside,
        write_columns(aside / "images", _IMAGES) as images,
        write_columns(aside / "tars", _TARS) as tars,
        ThreadPoolExecutor(_REQUESTS) as threads,
        Progress(f"open {where}", total=pairs.images, unit="images") as bar,
    ):
        numbers_of_tars = range(len(parts))
        fetched = in_order(lambda each: threads.submit(_fetch, store, each, parts[each]), numbers_of_tars, _REQUESTS)
        for number, fetch in enumerate(fetched):
            # Not in the threads: numpy reads a header with `ast`, of which Python 3.11 bears one call at a time.
            places = _table(where, number, parts[number], fetch)
            _check(where, number, places, fetch.note.size, index, pairs, parts[number])
            numbers = np.full(len(places), number)
            columns = [places["image"], numbers, places["offset"], places["length"], places["check"]]
            arrays = [pa.array(each, kind) for each, kind in zip(columns, _IMAGES.types, strict=True)]
            images.write(pa.table(arrays, schema=_IMAGES))
            tar = [store.path(f"{number:05d}.tar"), fetch.note.size, fetch.note.sample, fetch.etag or ""]
            tars.write(pa.table([[value] for value in tar], schema=_TARS))
            bar.update(len(places))


class _Note(NamedTuple):
    """What stands in the note of a tar: see `_write_tar`."""

    size: int
    sample: int
    etag: str | None
    places: str


class _Fetched(NamedTuple):
    """The note of a tar, the bytes of its table, and the ETag that the tar has now."""

    note: _Note
    table: bytes | None
    etag: str | None


def _fetch(store: Store, number: int, part: range) -> _Fetched:
    stem = f"{number:05d}"
    content = store.read(f"{stem}.json", _NOTE)
    if content is None:
        raise ModeError(f"{store.where}: not complete: {stem}.json is missing", "call `mode pack` once more")
    note = _note_of(store, f"{stem}.json", _json(content))
    etag = _etag_of(store, f"{stem}.tar", note)
    return _Fetched(note, store.read(f"{stem}.npy", len(part) * PLACES.itemsize + 1_024), etag)


def _note_of(store: Store, name: str, stated: Any) -> _Note:
    try:
        note = _Note(stated["bytes"], stated["sample"], stated["etag"], stated["places"])
    except (KeyError, TypeError):
        raise _damaged(store.where, name) from None
    numbers_are_right = type(note.size) is int and type(note.sample) is int and 0 <= note.sample < 2**32
    if not (numbers_are_right and isinstance(note.etag, str | None) and isinstance(note.places, str)):
        raise _damaged(store.where, name)
    return note


def _etag_of(store: Store, name: str, note: _Note) -> str | None:
    """The ETag of a tar, which is compared with its note: by size and ETag or, of a copy, which has another, by sample.

    A file of this machine has its sample compared when it is opened.
    """
    path = store.path(name)
    try:
        found = store.describe(name)
        is_right = found.size == note.size
        if is_right and is_url(path) and (found.etag is None or found.etag != note.etag):
            with closing(RemoteFile(path, found.size, etag=found.etag)) as tar:
                is_right = sample_of(tar) == note.sample
    except FileNotFoundError:
        raise ModeError(f"{path}: missing, but it was packed", _REMEDY) from None
    if not is_right:
        raise _damaged(store.where, name)
    return found.etag


def _table(where: str, number: int, part: range, fetched: _Fetched) -> NDArray[Any]:
    """The table of a tar."""
    content = fetched.table
    try:
        if content is None or hashlib.sha256(content).hexdigest() != fetched.note.places:
            raise ValueError
        places: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
        if places.dtype != PLACES or places.shape != (len(part),):
            raise ValueError
    except (ValueError, TypeError, EOFError, OSError, SyntaxError):
        raise _damaged(where, f"{number:05d}.npy") from None
    return places


def _check(
    where: str, number: int, places: NDArray[Any], size: int, index: PairIndex, pairs: Pairs, part: range
) -> None:
    """Refuse a table that is not of these images of the training."""
    rows = pairs.rows[pairs.first[part.start : part.stop]]
    right = (
        np.array_equal(places["image"], index.image[rows])
        and np.array_equal(places["length"], index.length[rows])
        and int(places["offset"].min()) >= HEADER
        and int((places["offset"] + places["length"]).max()) <= size
        and int(places["length"].max()) <= LARGEST_IMAGE
    )
    if not right:
        raise _damaged(where, f"{number:05d}.npy")


def _damaged(where: str, name: str) -> ModeError:
    return ModeError(f"{where}/{name}: damaged, or of another pack", _REMEDY)


class Pack:
    """Where the images of a training lie in its pack, by rows of the index as in the index itself (`Places`).

    Args:
        folder: that `fetch_table` wrote.
        index: of the source.
    """

    made = "packed"

    def __init__(self, folder: Path, index: PairIndex) -> None:
        self.folder, self._index = folder, index
        columns = open_columns(folder / "images", _IMAGES)
        self._image, self._file, self._offset, self._length, self._check = (
            _numbers(columns[name]) for name in _IMAGES.names
        )
        tars = open_columns(folder / "tars", _TARS)
        self._sizes, self._samples = _numbers(tars["size"]), _numbers(tars["sample"])
        self._paths, self._etags = _texts(tars["path"]), _texts(tars["etag"])
        self._marks = self._image[np.arange(0, len(self._image), _STRIDE)]

    @property
    def remedy(self) -> str:
        """What to do about a tar that is missing or another one; what was written down of it is kept otherwise."""
        return f"put it back; or {_REMEDY}, and then remove {self.folder}"

    @property
    def has_urls(self) -> bool:
        """Whether it is behind a URL."""
        return is_url(self._paths[0])

    @property
    def file_count(self) -> int:
        """Number of its tars."""
        return len(self._paths)

    def locate(self, rows: Rows) -> Located:
        """Where the images of pairs lie. Raises `ModeError` for one that is not in the pack."""
        places = self._places_of(self._index.image[rows])
        return Located(self._file[places], self._offset[places], self._length[places], self._check[places])

    def path(self, file: int) -> str:
        """Path or URL of one tar by its number."""
        return self._paths[file]

    def identity(self, file: int) -> tuple[int, int, str | None]:
        """Size in bytes and sample of one tar when it was packed, and its ETag when the pack was opened."""
        return int(self._sizes[file]), int(self._samples[file]), self._etags[file] or None

    def _places_of(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """Place of each image in the table, by a look between the marks on either side of it."""
        places = np.zeros(len(images), np.int64)
        blocks = np.searchsorted(self._marks, images, side="right") - 1
        for block in np.unique(blocks).tolist():
            mine, start = blocks == block, max(block, 0) * _STRIDE
            near = self._image[start : start + _STRIDE]
            within = np.minimum(np.searchsorted(near, images[mine]), len(near) - 1)
            if not np.array_equal(near[within], images[mine]):
                raise ModeError(f"{self.folder}: damaged: an image of the training is not in it", "remove it")
            places[mine] = start + within
        return places


def _numbers(column: Column | Texts) -> Column:
    assert isinstance(column, Column)
    return column


def _texts(column: Column | Texts) -> list[str]:
    assert isinstance(column, Texts)
    return column.take(range(len(column)))
