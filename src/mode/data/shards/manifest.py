"""What a source consists of: its shards with size, time and, if asked, checksum.

Shards may be terabytes outside the project. The manifest is the small file that stands for them: if a shard changes, so
does the manifest, and with it everything that is made from the source.
"""

from __future__ import annotations

import csv
import glob
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from mode.data.shards.filters import sidecar_of
from mode.data.shards.places import are_there, describe_all, digest_of, is_url, listed_urls, open_bytes
from mode.errors import ModeError
from mode.files import write_aside
from mode.params import SourceParams

#: Tables of (image path, caption) and what separates their columns.
SEPARATORS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (*SEPARATORS, ".parquet")
#: Bytes of a list of shards and of a line of it, and tars that it may name.
_LARGEST_LIST, _LONGEST_NAME, _MOST_LISTED = 2**27, 4_096, 1_000_000
#: Characters of a line of a csv's header, and its lines: where marks are not closed, it is all of the file.
_LONGEST_HEADER, _HEADER_LINES = 2**20, 100


@dataclass(frozen=True)
class Shard:
    """One file of a source.

    Attributes:
        path: as the source gives it: relative to the project folder, or absolute; or a URL.
        size: in bytes.
        mtime_ns: time of the last change, in nanoseconds since 1970; 0 where a server does not say, or with a checksum.
        checksum: SHA-256 in hexadecimal, or None where none was asked for.
        etag: of an object, the server's name for its content.
        factor: how often a pass over the data shows its images; None where a source has no sets.
    """

    path: str
    size: int
    mtime_ns: int
    checksum: str | None
    etag: str | None = None
    factor: float | None = None


@dataclass(frozen=True)
class Manifest:
    """The shards of one source, in order.

    Attributes:
        kind: `tars`, or `table`: one csv, tsv or parquet file of (image path, caption).
        shards: the tars sorted by path, or the one table (the images that it names are not listed).
        image_column, caption_column: of a table.
        filters: that an image of a tar has to meet, see `SourceParams`.
        sidecars: with filters, the parquet beside each tar, in the same order; none, if no tar has one.
        captions: where captions of tars stand, and with which probability each is taken, see `SourceParams`.
    """

    kind: Literal["tars", "table"]
    shards: list[Shard]
    image_column: str = "image"
    caption_column: str = "caption"
    filters: list[str] = field(default_factory=list)
    sidecars: list[Shard] = field(default_factory=list)
    captions: dict[str, float] | None = None

    def save(self, path: Path) -> None:
        """Write as JSON."""
        with write_aside(path) as temporary:
            content = asdict(self)
            for shard in [*content["shards"], *content["sidecars"]]:
                for name in ("etag", "factor"):
                    if shard[name] is None:  # no file of this machine has an ETag
                        del shard[name]
            for name in ("filters", "sidecars", "captions"):
                if not content[name]:  # nearly always
                    del content[name]
            temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read what `save` wrote. Raises `ModeError` where that is missing, or no manifest."""
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            shards = [Shard(**shard) for shard in content.pop("shards")]
            sidecars = [Shard(**sidecar) for sidecar in content.pop("sidecars", [])]
            return cls(shards=shards, sidecars=sidecars, **content)
        except FileNotFoundError:
            raise ModeError(f"{path}: no such manifest", "`dvc repro` lists the shards") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ModeError(f"{path}: not a manifest", "delete it and run its stage again") from None


def build_manifest(source: SourceParams, root: Path, only: Collection[str] | None = None) -> Manifest:
    """List the shards of a source.

    Args:
        source: `shards` is a folder (searched with its subfolders for `*.tar`), a tar, a glob of tars (`**` crosses
            folders), or a csv, tsv or parquet table; or a URL that fsspec knows: of a tar, a range of tars
            (`{000..999}`), a glob or a prefix; or a `.txt` with a path or URL in each line; or several of these (but no
            table), each with its factor.
        root: the project folder; relative paths start from it, and stay relative in the manifest.
        only: names of the tars to list, of those that are found; default all.

    Raises:
        ModeError: no such path, no tar in the folder, no match of the glob, a tar in two sets, a tar of `only` that is
            not there, or a table without the named columns; a server that does not answer.
    """
    if isinstance(source.shards, dict):
        return _of_sets(source.shards, source, root, only)
    found = _only(_files_of(source.shards, root), only)
    others = [name for name in found if not name.endswith(".tar")]
    if not others:
        return _of_tars(found, source, root)
    if len(found) > 1 or not others[0].endswith(TABLE_SUFFIXES):
        what = f"{others[0]}: neither a .tar nor a single table ({', '.join(TABLE_SUFFIXES)})"
        raise ModeError(what, "name tars, or one table")
    if source.filters:
        raise ModeError(f"{source.shards}: filters are for tars, this is a table", "leave the rows out of the table")
    if source.captions:
        raise ModeError(f"{source.shards}: captions are for tars, this is a table", "caption_column names its column")
    _check_columns(source, root / others[0])
    shards = _describe(others[:1], root, source.checksum)
    return Manifest("table", shards, source.image_column, source.caption_column)


def names_of(shards: str | Mapping[str, float], root: Path) -> list[str]:
    """Paths and URLs of all shards of a source, without a look at any of them.

    Raises:
        ModeError: as `build_manifest` for what is not there.
    """
    return [name for each in ([shards] if isinstance(shards, str) else shards) for name in _files_of(each, root)]


def _files_of(shards: str, root: Path) -> list[str]:
    """The files that a folder, a glob, a path, a URL or a list means, sorted."""
    if shards.endswith(".txt") or is_url(shards):
        return _listed(shards, root)
    path = root / shards
    if path.is_dir():
        found = [str(Path(shards) / tar.relative_to(path)) for tar in path.rglob("*.tar") if tar.is_file()]
        if not found:
            raise ModeError(f"{shards}: no .tar in this folder", "sources.<name>.shards names a folder of tars")
    elif glob.has_magic(shards):
        names = glob.glob(shards, root_dir=root, recursive=True)  # noqa: PTH207 (pathlib takes no absolute ones)
        found = [name for name in names if (root / name).is_file()]
        if not found:
            raise ModeError(f"{shards}: no file matches", "brace ranges such as {0..9} are not globs")
    elif path.is_file():
        found = [shards]
    else:
        raise ModeError(f"{shards}: no such file or folder", "paths are relative to the project folder")
    return sorted(found)


def _only(found: list[str], only: Collection[str] | None) -> list[str]:
    """Those that are wanted, in the order in which they were found."""
    if only is None:
        return found
    if missing := sorted(set(only) - set(found)):
        raise ModeError(f"{missing[0]}: no such shard, but arrivals.json names it", "put it back")
    wanted = set(only)
    return [name for name in found if name in wanted]


def _of_sets(
    sets: Mapping[str, float], source: SourceParams, root: Path, only: Collection[str] | None = None
) -> Manifest:
    """Tars of several sets, one set after the other, each with the factor of its set."""
    set_of: dict[str, str] = {}
    for each in sets:
        for name in _files_of(each, root):
            if not name.endswith(".tar"):
                raise ModeError(f"{name}: not a .tar, but one of several sets", "a table is a source by itself")
            if set_of.setdefault(name, each) != each:
                raise ModeError(f"{name}: in two sets of one source: {set_of[name]} and {each}", "leave it out of one")
    manifest = _of_tars(_only(list(set_of), only), source, root)
    shards = [replace(shard, factor=sets[set_of[shard.path]]) for shard in manifest.shards]
    return replace(manifest, shards=shards)


def _of_tars(names: list[str], source: SourceParams, root: Path) -> Manifest:
    shards = _describe(names, root, source.checksum)
    sidecars = _describe(_sidecars(names, root), root, source.checksum) if source.filters else []
    return Manifest("tars", shards, filters=source.filters, sidecars=sidecars, captions=source.captions)


def _sidecars(tars: list[str], root: Path) -> list[str]:
    """The parquet beside each tar; none if no tar has one: then values are in the jsons."""
    sidecars = [sidecar_of(tar) for tar in tars]
    missing = [sidecar for sidecar, there in zip(sidecars, are_there(sidecars, root), strict=True) if not there]
    if missing and len(missing) < len(sidecars):
        others = f"{len(sidecars) - len(missing)} of {len(sidecars)} tars have their parquet"
        raise ModeError(f"{missing[0]}: no such file, but {others}", "filters need it beside every tar, or beside none")
    return [] if missing else sidecars


def _describe(names: list[str], root: Path, checksum: bool) -> list[Shard]:
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ModeError(f"{name}: the name is not UTF-8, no manifest can hold it", "rename the file") from None
    try:
        found = describe_all(names, root)
    except FileNotFoundError as error:
        raise ModeError(
            f"{error.filename or error}: no such shard", "check sources.NAME.shards, or put it back"
        ) from None
    return [
        # Where the content is known, its time says nothing: a copy has another one.
        Shard(name, each.size, 0, digest_of(name, root), each.etag)
        if checksum
        else Shard(name, each.size, each.mtime_ns, None, each.etag)
        for name, each in zip(names, found, strict=True)
    ]


def _listed(shards: str, root: Path) -> list[str]:
    """Tars by their URLs, or those that a list names, sorted."""
    if not shards.endswith(".txt"):
        return listed_urls(shards)
    tars: set[str] = set()
    for line in _lines_of(shards, root):
        tars.update(listed_urls(line) if is_url(line) else [line])
        if len(tars) > _MOST_LISTED:
            raise ModeError(f"{shards}: names more than {_MOST_LISTED:,} tars", "split it, into several sources")
    wrong = next((tar for tar in sorted(tars) if not tar.endswith(".tar")), None)
    if wrong or not tars:
        raise ModeError(f"{shards}: {f'{wrong} is no .tar' if wrong else 'names no tar'}", "one path or URL a line")
    return sorted(tars)


def _lines_of(shards: str, root: Path) -> Iterator[str]:
    """The paths and URLs of a list, one a line; lines that are empty or begin with # are passed over."""
    try:
        with closing(open_bytes(shards, root)) as file:
            if file.size > _LARGEST_LIST:
                what = f"{shards}: {file.size:,} bytes, a list may have {_LARGEST_LIST:,}"
                raise ModeError(what, "it has to name a .tar in each line")
            content = file.read(file.size, 0)
        for number, line in enumerate(io.BytesIO(content), 1):
            if len(line) > _LONGEST_NAME:
                what = f"{shards}: line {number:,} has {len(line):,} bytes, a name may have {_LONGEST_NAME:,}"
                raise ModeError(what, "one path or URL a line")
            name = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if name and not name.startswith("#"):
                yield name
    except FileNotFoundError:
        raise ModeError(f"{shards}: no such file", "paths are relative to the project folder") from None
    except UnicodeDecodeError:
        raise ModeError(f"{shards}: not UTF-8 text", "save the list as UTF-8") from None


def _check_columns(source: SourceParams, path: Path) -> None:
    columns = _columns_of(path)
    for column in (source.image_column, source.caption_column):
        if column not in columns:
            has = ", ".join(f"'{name}'" for name in columns)[:500] or "no columns"
            advice = "--image-column and --caption-column name others, image_column and caption_column in params.yaml"
            raise ModeError(f"{source.shards}: no column '{column}': it has {has}", advice)


def _columns_of(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        import pyarrow as pa  # only a parquet table needs it, and importing it is slow
        from pyarrow import parquet

        try:
            return list(parquet.read_schema(path).names)
        except (pa.ArrowException, OSError):
            raise ModeError(f"{path}: not a parquet file", "is it damaged? fetch it again") from None
    with open_table(path) as file:
        # In parts: a file that is no text may be one line of gigabytes.
        return header_of(iter(partial(file.readline, _LONGEST_HEADER), ""), SEPARATORS[path.suffix], path)


def open_table(path: Path) -> TextIO:
    """A csv or tsv; bytes that are not UTF-8 become halves of surrogate pairs, so that one spoils no other row."""
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def header_of(lines: Iterable[str], separator: str, path: Path) -> list[str]:
    """The names of the columns, none if there is no line.

    Raises:
        ModeError: they are not UTF-8, or no csv.
    """
    try:
        header = next(csv.reader(islice(lines, _HEADER_LINES), delimiter=separator), [])
        separator.join(header).encode()
    except csv.Error as error:
        raise ModeError(f"{path}: its first line cannot be read: {error}", "it has to name the columns") from None
    except UnicodeEncodeError:
        raise ModeError(f"{path}: not UTF-8 text", "save the table as UTF-8") from None
    return header
