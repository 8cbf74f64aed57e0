"""Where every pair lies: one row per (image, caption), so that reading an image is one `pread`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute

from mode.checksums import write_manifest
from mode.data.shards.account import IndexReport
from mode.data.shards.filters import Filters
from mode.data.shards.manifest import Manifest, Shard, build_manifest
from mode.data.shards.places import Description, describe_all, is_url
from mode.data.shards.scan import Scan, Wanted, scan_tar
from mode.data.shards.tables import scan_table
from mode.errors import ModeError
from mode.files import is_there, write_aside
from mode.parallel import cores, ordered_map
from mode.params import IndexParams, SourceParams
from mode.progress import Progress
from mode.sealed_parquet import iter_sealed, names_of, read_sealed, write_sealed

#: Columns of index.parquet; rows are ordered by file, offset and caption_number.
SCHEMA = pa.schema(
    [
        ("file", pa.int32()),  # number of the file that holds the image, see files.parquet
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
#: Columns of files.parquet.
FILES = pa.schema(
    [
        ("file", pa.int32()),  # number, 0 ..
        ("path", pa.string()),
        ("size", pa.int64()),  # bytes
        ("sample", pa.uint32()),  # of a tar on this machine, what tells it from another one, see identity.py; else 0
        ("etag", pa.string()),  # of an object, if its server gives one
    ]
)
#: One more, of a source with several sets: how often a pass over the data shows an image of the file.
FACTOR = pa.field("factor", pa.float64())

#: Columns that a `PairIndex` holds as arrays.
_IN_MEMORY = ("file", "image", "offset", "length", "check", PROBABILITY.name)

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

    Writes the folder `out`: `index.parquet` (see `SCHEMA`), `files.parquet` (each file that holds images, see `FILES`),
    `quarantine.csv` (file, key, kind and detail of everything skipped), `report.json` (counts per file) and
    `SHA256SUMS` of all of these.

    Args:
        manifest: the source's shards.
        root: folder that relative paths start from.
        out: folder to write, as a whole or not at all.
        params: whether to decode every image, and the share of bad pairs at which to stop.
        workers: processes; default one per core if there is enough to read.
        unwanted: (file, key) of images to leave out, as `files.parquet` and `index.parquet` name them.

    Raises:
        ModeError: a shard is missing or not the one in the manifest; too many pairs are bad; there is no pair.
    """
    etags = {shard.path: found.etag for shard, found in _check_shards(manifest.shards, root)}
    factors = {shard.path: shard.factor for shard in manifest.shards if shard.factor is not None}
    _check_shards(manifest.sidecars, root)
    report = IndexReport()
    with write_aside(out) as folder:
        folder.mkdir()
        paths: list[str] = []
        fields: set[str] = set()  # of jsons, which filters look at
        files: dict[str, list[Any]] = {"size": [], "sample": [], "etag": []}
        schema = SCHEMA.append(PROBABILITY) if manifest.captions else SCHEMA
        with write_sealed(folder / "index.parquet", schema, compression="zstd") as writer:
            for scan in _scan_shards(manifest, root, params, workers):
                if unwanted:
                    scan.drop(unwanted)
                writer.write_table(_to_table(scan, schema, len(paths), report.images))
                paths += scan.files
                files["size"] += [scan.size] if manifest.kind == "tars" else scan.lengths
                files["sample"] += [scan.sample] * len(scan.files)
                files["etag"] += [etags[scan.path]] * len(scan.files)
                report.add(scan)
                fields |= scan.fields
        if report.filtered and not manifest.sidecars:
            _check_fields(Filters(manifest.filters).columns, fields)
        report.check(params.max_bad_share)
        numbered = {"file": range(len(paths)), "path": paths, **files}
        schema = FILES.append(FACTOR) if factors else FILES
        if factors:
            numbered[FACTOR.name] = [factors[path] for path in paths]
        with write_sealed(folder / "files.parquet", schema) as writer:
            writer.write_table(pa.table(numbered, schema=schema))
        report.save(folder)
        write_manifest(folder)
    return report


def verify(paths: Sequence[str], root: Path, check_images: bool = True) -> IndexReport:
    """Read shards as `build_index` does and account for everything that is not a pair, without writing an index.

    Args:
        paths: tars, folders or globs of tars, or tables (with the columns `image` and `caption`).
        root, check_images: as in `build_index`.

    Raises:
        ModeError: a path is none of these.
    """
    report = IndexReport()
    for manifest in [build_manifest(SourceParams(shards=path), root) for path in paths]:
        for scan in _scan_shards(manifest, root, IndexParams(check_images=check_images)):
            report.add(scan)
    return report


def _check_shards(shards: Sequence[Shard], root: Path) -> list[tuple[Shard, Description]]:
    """Files of a manifest with what is there now, after comparing the two."""
    paths = [shard.path for shard in shards]
    missing = [path for path in paths if not is_url(path) and not (root / path).is_file()]
    if missing:
        raise ModeError(f"{missing[0]}: missing, with {len(missing) - 1} more of {len(shards)} shards")
    there = list(zip(shards, describe_all(paths, root), strict=True))
    for shard, found in there:
        wrong = "not the object in the manifest" if shard.etag not in (None, found.etag) else ""
        if found.size != shard.size:
            wrong = f"{found.size} bytes, {shard.size} in the manifest"
        if wrong:
            raise ModeError(f"{shard.path}: {wrong}", "run the manifest stage again")
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
        yield scan_table(manifest, root, params.check_images, workers)
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


def _to_table(scan: Scan, schema: pa.Schema, first_file: int, first_image: int) -> pa.Table:
    keys = [key.encode("utf-8", "backslashreplace").decode() for key in scan.keys]
    images = np.repeat(np.arange(len(keys)), [len(captions) for captions in scan.captions])  # of each pair
    columns = [
        first_file + np.minimum(images, len(scan.files) - 1),  # all in one file, or each in its own
        pa.array(keys, pa.string()).take(images),
        first_image + images,
        [number for captions in scan.captions for number in range(len(captions))],
        [caption for captions in scan.captions for caption in captions],
        np.asarray(scan.offsets, np.int64)[images],
        np.asarray(scan.lengths, np.int64)[images],
        np.asarray(scan.checks, np.uint32)[images],
    ]
    if PROBABILITY in schema:
        columns.append([probability for each in scan.probabilities for probability in each])
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema)


class PairIndex:
    """The index of one source in memory: flat arrays, which forked workers share without growing.

    Attributes:
        file: int32 [pairs], number of the file that holds the image; `files[number]` is its path.
        image: int64 [pairs], number of the image; the captions of an image are neighbouring rows.
        offset: int64 [pairs], length: int32 [pairs]: bytes of the encoded image in its file.
        check: uint32 [pairs]: what tells the image from another one, see `identity`; zeros in an older index.
        probability: float32 [pairs], see `PROBABILITY`; None where all captions of an image are alike.
        images: number of distinct images.

    Example:
        index = PairIndex.load(Path("data/base/index"))
        index.caption(0), index.files[index.file[0]]
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not is_there(folder):
            raise ModeError(f"{folder}: not an index", "run its stage")
        known = {*_IN_MEMORY} & {*names_of(folder / "index.parquet")}
        columns = read_sealed(folder / "index.parquet", sorted(known))
        self._files = read_sealed(folder / "files.parquet").combine_chunks()
        self._paths = self._files["path"].chunk(0) if self._files.num_rows else pa.array([], pa.string())
        self.file: np.ndarray = columns["file"].to_numpy()
        self.image: np.ndarray = columns["image"].to_numpy()
        self.offset: np.ndarray = columns["offset"].to_numpy()
        self.length: np.ndarray = columns["length"].to_numpy()
        self.check: np.ndarray = (
            columns["check"].to_numpy() if "check" in known else np.zeros(len(self.file), np.uint32)
        )
        self.probability: np.ndarray | None = (
            columns[PROBABILITY.name].to_numpy() if PROBABILITY.name in known else None
        )
        self.images = int(self.image[-1]) + 1 if len(self.image) else 0

    @classmethod
    def load(cls, folder: Path) -> PairIndex:
        """Open what `build_index` wrote, captions when first asked for. Raises `ModeError` if it is no sound index."""
        return cls(folder)

    def __len__(self) -> int:
        return len(self.file)

    @cached_property
    def has_urls(self) -> bool:
        """Whether images lie in objects, and not only in files of this machine."""
        return bool(compute.any(compute.match_substring(self._paths, "://")).as_py())

    @property
    def factor(self) -> np.ndarray | None:
        """How often a pass over the data shows the image of each pair, float64 [pairs]; None where all are alike."""
        if FACTOR.name not in self._files.column_names:
            return None
        factors: np.ndarray = self._files[FACTOR.name].to_numpy()[self.file]
        return factors

    @property
    def files(self) -> list[str]:
        """Paths of all files that hold images, by number; relative ones start from the project folder."""
        paths: list[str] = self._paths.to_pylist()
        return paths

    def path(self, file: int) -> str:
        """Path of one file by its number, without a list of all."""
        return str(self._paths[int(file)])

    def identity(self, file: int) -> tuple[int, int, str | None] | None:
        """Size in bytes, sample and ETag of one file as they were (see `FILES`); None in an older index."""
        if "size" not in self._files.column_names:
            return None
        size, sample, etag = (self._files[name][int(file)].as_py() for name in ("size", "sample", "etag"))
        return size, sample, etag

    def caption(self, row: int) -> str:
        """Caption of one pair."""
        return str(self._captions[int(row)])

    def captions(self, rows: np.ndarray | Sequence[int]) -> list[str]:
        """Captions of pairs, in the order asked for."""
        taken: list[str] = self._captions.take(pa.array(np.asarray(rows, np.int64))).to_pylist()
        return taken

    def keys(self, rows: np.ndarray | Sequence[int]) -> list[str]:
        """Keys of the images of pairs, in the order asked for, read from the disk."""
        column = read_sealed(self._folder / "index.parquet", ["key"])["key"]
        taken: list[str] = column.take(pa.array(np.asarray(rows, np.int64))).to_pylist()
        return taken

    def iter_captions(self, batch: int = 65_536) -> Iterator[list[str]]:
        """All captions in row order, `batch` at a time, read from the disk as one goes."""
        yield from iter_sealed(self._folder / "index.parquet", "caption", batch)

    @cached_property
    def _captions(self) -> pa.Array:
        """One Arrow array: one buffer of text, no Python objects that workers would copy by counting references."""
        column = read_sealed(self._folder / "index.parquet", ["caption"])["caption"]
        return column.cast(pa.large_string()).combine_chunks()
