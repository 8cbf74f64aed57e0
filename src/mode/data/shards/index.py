"""Where every pair lies: one row per (image, caption), so that reading an image is one `pread`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mode.checksums import ADVICE, listed_digest, write_manifest
from mode.columns import Column, Rows, Texts, open_columns, write_columns
from mode.data.shards.account import LISTED, IndexReport, quarantine
from mode.data.shards.filters import Filters
from mode.data.shards.identity import changed, difference
from mode.data.shards.manifest import Manifest, Shard, build_manifest
from mode.data.shards.places import Description, describe_all, is_url
from mode.data.shards.reading import Located
from mode.data.shards.scan import Scan, Wanted, scan_tar
from mode.data.shards.tables import scan_table
from mode.errors import ModeError
from mode.files import is_there, sha256_of, write_aside
from mode.parallel import cores, ordered_map
from mode.params import IndexParams, SourceParams
from mode.progress import Progress

#: Columns of `pairs`; rows are ordered by file, offset and caption_number.
PAIRS = pa.schema(
    [
        ("file", pa.int32()),  # number of the file that holds the image, see `FILES`
        ("key", pa.string()),
        ("image", pa.int64()),  # number of the image in this source, 0 ..
        ("caption_number", pa.int16()),  # among the captions of this image, 0 ..
        ("caption", pa.string()),
        ("offset", pa.int64()),  # of the encoded image in its file, bytes
        ("length", pa.int32()),  # of the encoded image, bytes
        ("check", pa.uint32()),  # what tells this image from another one in its place, see identity.py; 0: nothing does
    ]
)
#: One more, of a source with `captions`: how probable it is that a sample of the image takes this caption, up to a
#: factor that all captions of the image share.
PROBABILITY = pa.field("probability", pa.float32())
#: Columns of `images`; there is one row more than images, which is the number of pairs.
IMAGES = pa.schema([("first", pa.int64())])  # pair that is the first of the image, 0 ..
#: Columns of `files`.
FILES = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),  # bytes
        ("sample", pa.uint32()),  # of a tar on this machine, what tells it from another one, see identity.py; else 0
        ("etag", pa.string()),  # of an object, if its server gives one; else empty
    ]
)
#: One more, of a source with several sets: how often a pass over the data shows an image of the file.
FACTOR = pa.field("factor", pa.float64())

#: Pairs that are written together, and those of one image more.
_BLOCK = 65_536

#: Below these many bytes of shards, starting processes takes longer than reading them in this one; and the same where
#: image bytes are passed over.
_WORTH_PROCESSES, _WORTH_PROCESSES_UNREAD = 64 * 2**20, 512 * 2**20


def build_index(
    manifest: Manifest,
    root: Path,
    out: Path,
    params: IndexParams,
    workers: int | None = None,
    unwanted: Collection[tuple[str, str]] = (),
) -> IndexReport:
    """Index a source: find its pairs, and list what is bad.

    Writes the folder `out`: the tables `pairs`, `images` and `files` (see `PAIRS`, `IMAGES`, `FILES` and
    `mode.columns`), `quarantine.csv` (file, key, kind and detail of everything skipped), `report.json` (counts per
    file) and `SHA256SUMS` of all of these. Memory: one shard, or of a table a part of it.

    Args:
        manifest: the source's shards.
        root: folder that relative paths start from.
        out: folder to write, as a whole or not at all.
        params: whether to decode every image, and the share of bad pairs at which to stop.
        workers: processes; default one per core if there is enough to read.
        unwanted: (file, key) of images to leave out, as the columns `path` and `key` name them.

    Raises:
        ModeError: a shard is missing or not the one in the manifest, or changes meanwhile; too many pairs are bad;
            there is no pair.
    """
    there = {shard.path: found for shard, found in _check_shards(manifest.shards, root)}
    factors = {shard.path: shard.factor for shard in manifest.shards if shard.factor is not None}
    _check_shards(manifest.sidecars, root)
    report = IndexReport()
    with write_aside(out) as folder:
        folder.mkdir()
        fields: set[str] = set()  # of jsons, which filters look at
        with (
            quarantine(folder) as skip,
            IndexWriter(folder, bool(manifest.captions), bool(factors)) as writer,
        ):
            for scan in _scan_shards(manifest, root, params, workers):
                before = there[scan.path]
                if scan.found not in (None, before):
                    raise changed(scan.path, difference(before, scan.found))
                if unwanted:
                    scan.drop(unwanted)
                sizes = [scan.size] if manifest.kind == "tars" else scan.lengths
                writer.add(scan, sizes, before.etag, factors.get(scan.path))
                skip(scan.problems)
                report.add(scan)
                fields |= scan.fields
        if report.filtered and not manifest.sidecars:
            _check_fields(Filters(manifest.filters).columns, fields)
        report.check(params.max_bad_share)
        report.save(folder)
        write_manifest(folder)
    return report


def verify(
    paths: Sequence[str],
    root: Path,
    check_images: bool = True,
    listed: int = LISTED,
    columns: Mapping[str, str] | None = None,
) -> IndexReport:
    """Read shards as `build_index` does and account for everything that is not a pair, without writing an index.

    Args:
        paths: tars, folders or globs of tars, or tables.
        root, check_images: as in `build_index`.
        listed: problems to keep in the report.
        columns: `image_column` and `caption_column` of tables, as in `SourceParams`, if they have other names.

    Raises:
        ModeError: a path is none of these, or a shard changes meanwhile.
    """
    report = IndexReport(listed=listed)
    sources = [SourceParams.model_validate({"shards": path, **(columns or {})}) for path in paths]
    for manifest in [build_manifest(source, root) for source in sources]:
        for scan in _scan_shards(manifest, root, IndexParams(check_images=check_images)):
            report.add(scan)
    return report


def _check_shards(shards: Sequence[Shard], root: Path) -> list[tuple[Shard, Description]]:
    """Files of a manifest with what is there now, after comparing the two."""
    paths = [shard.path for shard in shards]
    missing = [path for path in paths if not is_url(path) and not (root / path).is_file()]
    if missing:
        what = f"{missing[0]}: missing, with {len(missing) - 1} more of {len(shards)} shards"
        raise ModeError(what, "put them back; or `dvc repro` lists what is there")
    there = list(zip(shards, describe_all(paths, root), strict=True))
    for shard, found in there:
        wrong = "not the object in the manifest" if shard.etag not in (None, found.etag) else ""
        if found.size != shard.size:
            wrong = f"{found.size} bytes, {shard.size} in the manifest"
        if wrong:
            raise ModeError(f"{shard.path}: {wrong}", "`dvc repro` lists the shards again")
    return there


def _check_fields(columns: Sequence[str], fields: Collection[str]) -> None:
    """Refuse filters of what no image has: a slip of the pen would leave out all of them."""
    if missing := [column for column in columns if column not in fields]:
        fault = f"filters: no json of these tars has '{missing[0]}', and there is no parquet beside them"
        raise ModeError(fault, "see sources.NAME.filters")


def _scan_shards(manifest: Manifest, root: Path, params: IndexParams, workers: int | None = None) -> Iterator[Scan]:
    if workers is None:
        workers = cores() if _worth_processes(manifest, params) else 1
    if manifest.kind == "table":
        yield from scan_table(manifest, root, params.check_images, workers)
        return
    shards = [shard.path for shard in manifest.shards]
    wanted = Wanted(manifest.captions, Filters(manifest.filters), beside_tars=bool(manifest.sidecars))
    scan_one = partial(scan_tar, root=root, check_images=params.check_images, wanted=wanted)
    with Progress("index", total=len(shards), unit="shards") as bar:
        bad = 0
        for scan in ordered_map(scan_one, shards, min(workers, len(shards))):
            yield scan
            bad += len(scan.problems)
            bar.update(bad=str(bad))


def _worth_processes(manifest: Manifest, params: IndexParams) -> bool:
    size = sum(shard.size for shard in manifest.shards)
    if not params.check_images:
        return size > _WORTH_PROCESSES_UNREAD
    return manifest.kind == "table" or size > _WORTH_PROCESSES


class IndexWriter:
    """Writes the tables of an index, a shard at a time, when used in a `with`.

    Args:
        folder: of the index, which is there.
        has_probabilities: whether shards come with the probability of each caption.
        has_factors: whether files come with a factor.
    """

    def __init__(self, folder: Path, has_probabilities: bool, has_factors: bool) -> None:
        self._schema = PAIRS.append(PROBABILITY) if has_probabilities else PAIRS
        self._files_schema = FILES.append(FACTOR) if has_factors else FILES
        self._folder, self._open = folder, ExitStack()
        self._counts = {"pairs": 0, "images": 0, "files": 0}

    def __enter__(self) -> IndexWriter:
        self._pairs = self._open.enter_context(write_columns(self._folder / "pairs", self._schema))
        self._images = self._open.enter_context(write_columns(self._folder / "images", IMAGES))
        self._files = self._open.enter_context(write_columns(self._folder / "files", self._files_schema))
        return self

    def __exit__(self, *error: Any) -> bool | None:
        if error[0] is None:
            self._images.write(pa.table([[self._counts["pairs"]]], schema=IMAGES))
        return self._open.__exit__(*error)

    def add(self, scan: Scan, sizes: Sequence[int], etag: str | None, factor: float | None) -> None:
        """Add a shard, with the sizes of its files and what its server and the manifest say of all of them."""
        for some in _parts(scan.captions):
            self._add_pairs(scan, some)
        alike: list[Any] = [scan.sample, etag or "", *([] if factor is None else [factor])]
        columns = [scan.files, sizes, *([value] * len(scan.files) for value in alike)]
        self._files.write(_table(columns, self._files_schema))
        self._counts["files"] += len(scan.files)

    def _add_pairs(self, scan: Scan, some: slice) -> None:
        """Add some images of a shard with their captions."""
        keys = [key.encode("utf-8", "backslashreplace").decode() for key in scan.keys[some]]
        captions = scan.captions[some]
        counts = [len(each) for each in captions]
        owners, firsts = np.repeat(np.arange(len(keys)), counts), np.cumsum([0, *counts[:-1]])  # of each pair; image
        columns = [
            self._counts["files"] + np.minimum(some.start + owners, len(scan.files) - 1),  # all in one, or each its own
            pa.array(keys, pa.string()).take(owners),
            self._counts["images"] + owners,
            np.arange(len(owners)) - np.repeat(firsts, counts),
            [*chain.from_iterable(captions)],
            np.asarray(scan.offsets[some], np.int64)[owners],
            np.asarray(scan.lengths[some], np.int64)[owners],
            np.asarray(scan.checks[some], np.uint32)[owners],
        ]
        if PROBABILITY in self._schema:
            columns.append([*chain.from_iterable(scan.probabilities[some])])
        self._pairs.write(_table(columns, self._schema))
        self._images.write(_table([self._counts["pairs"] + firsts], IMAGES))
        self._counts["pairs"] += len(owners)
        self._counts["images"] += len(keys)


def _parts(captions: Sequence[Sequence[str]]) -> Iterator[slice]:
    """Images with their captions, as many at a time as have a block of pairs: images may have very many captions."""
    first, pairs = 0, 0
    for number, each in enumerate(captions, 1):
        pairs += len(each)
        if pairs >= _BLOCK or number == len(captions):
            yield slice(first, number)
            first, pairs = number, 0


def _table(columns: Sequence[Any], schema: pa.Schema) -> pa.Table:
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema)


class PairIndex:
    """The index of one source: columns that are read where they are asked for, whatever the number of pairs.

    Attributes:
        file: int32 [pairs], number of the file that holds the image; `path` gives its path.
        image: int64 [pairs], number of the image; the captions of an image are neighbouring rows.
        offset: int64 [pairs], length: int32 [pairs]: bytes of the encoded image in its file.
        check: uint32 [pairs]: what tells the image from another one, see `identity`.
        probability: float32 [pairs], see `PROBABILITY`; None where all captions of an image are alike.
        first: int64 [images + 1], see `IMAGES`.
        factor: float64 [files], how often a pass over the data shows an image of the file; None where all are alike.
        images: number of distinct images.

    Example:
        index = PairIndex.load(Path("data/base/index"))
        index.caption(0), index.path(index.file[0])
    """

    made, remedy = "indexed", "put it back, or index the source again"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not is_there(folder):
            raise ModeError(f"{folder}: not an index", "`dvc repro index` makes those of all sources")
        if not (folder / "pairs").is_dir():
            raise ModeError(f"{folder}: not an index, or one of an older version", "run its stage again")
        pairs = open_columns(folder / "pairs", _present(folder / "pairs", PAIRS, PROBABILITY))
        files = open_columns(folder / "files", _present(folder / "files", FILES, FACTOR))
        self.file, self.image = _numbers(pairs["file"]), _numbers(pairs["image"])
        self.offset, self.length = _numbers(pairs["offset"]), _numbers(pairs["length"])
        self.check = _numbers(pairs["check"])
        self.probability = _numbers(pairs[PROBABILITY.name]) if PROBABILITY.name in pairs else None
        self.first = _numbers(open_columns(folder / "images", IMAGES)["first"])
        self.factor = _numbers(files[FACTOR.name]) if FACTOR.name in files else None
        self._captions, self._keys = _texts(pairs["caption"]), _texts(pairs["key"])
        self._paths, self._etags = _texts(files["path"]), _texts(files["etag"])
        self._sizes, self._samples = _numbers(files["size"]), _numbers(files["sample"])
        self.images = len(self.first) - 1
        if not len(self.first) or self.first[-1] != len(self.image):
            raise ModeError(f"{folder}: damaged: its images are not those of its pairs", ADVICE)

    @classmethod
    def load(cls, folder: Path) -> PairIndex:
        """Open what `build_index` wrote. Raises `ModeError` if it is no sound index, as far as lengths say."""
        return cls(folder)

    def __len__(self) -> int:
        return len(self.image)

    @cached_property
    def has_urls(self) -> bool:
        """Whether images lie in objects, and not only in files of this machine."""
        return any(is_url(path) for block in self._paths.blocks() for path in block)

    @property
    def files(self) -> list[str]:
        """Paths of all files that hold images, by number; relative ones start from the project folder."""
        return self._paths.take(range(len(self._paths)))

    @property
    def file_count(self) -> int:
        """Number of files that hold images."""
        return len(self._paths)

    def locate(self, rows: Rows) -> Located:
        """Where the images of pairs lie, in the order asked for."""
        return Located(self.file[rows], self.offset[rows], self.length[rows], self.check[rows])

    def path(self, file: int) -> str:
        """Path of one file by its number, without a list of all. Raises `ModeError` where no file has that number."""
        self._check_file(file)
        return self._paths[int(file)]

    def identity(self, file: int) -> tuple[int, int, str | None]:
        """Size in bytes, sample and ETag of one file as they were (see `FILES`). Raises as `path`."""
        self._check_file(file)
        return int(self._sizes[file]), int(self._samples[file]), self._etags[int(file)] or None

    def caption(self, row: int) -> str:
        """Caption of one pair."""
        return self._captions[int(row)]

    def captions(self, rows: Rows) -> list[str]:
        """Captions of pairs, in the order asked for."""
        return self._captions.take(rows)

    def keys(self, rows: Rows) -> list[str]:
        """Keys of the images of pairs, in the order asked for."""
        return self._keys.take(rows)

    def iter_captions(self, batch: int = 65_536) -> Iterator[list[str]]:
        """All captions in row order, `batch` at a time, read from the disk as one goes."""
        return self._captions.blocks(batch)

    def digests(self, *names: str) -> list[str]:
        """SHA-256 of files of the table `pairs`, as far as they are there, at the cost of reading `SHA256SUMS`."""
        found = [self.folder / "pairs" / name for name in names]
        return [
            listed_digest(self.folder, path.relative_to(self.folder).as_posix()) or sha256_of(path)
            for path in found
            if path.is_file()
        ]

    def _check_file(self, file: int) -> None:
        if not 0 <= file < len(self._paths):
            raise ModeError(f"{self.folder}: damaged: a pair is in file {file:,} of {len(self._paths):,}", ADVICE)


def _present(folder: Path, schema: pa.Schema, more: pa.Field) -> pa.Schema:
    """The schema, with one more column where the table has that."""
    return schema.append(more) if (folder / f"{more.name}.npy").is_file() else schema


def _numbers(column: Column | Texts) -> Column:
    assert isinstance(column, Column)
    return column


def _texts(column: Column | Texts) -> Texts:
    assert isinstance(column, Texts)
    return column
