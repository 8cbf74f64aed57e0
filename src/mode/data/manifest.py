"""What a source consists of: its shards with size, time and, if asked, checksum.

Shards may be terabytes outside the project. The manifest is the small file that stands for them: if a shard changes, so
does the manifest, and with it everything that is made from the source.
"""

from __future__ import annotations

import csv
import glob
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mode.data.files import sha256_of, write_aside
from mode.errors import ModeError
from mode.params import SourceParams

#: Tables of (image path, caption) and what separates their columns.
SEPARATORS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (*SEPARATORS, ".parquet")


@dataclass(frozen=True)
class Shard:
    """One file of a source.

    Attributes:
        path: as the source gives it: relative to the project folder, or absolute.
        size: in bytes.
        mtime_ns: time of the last change, in nanoseconds since 1970.
        checksum: SHA-256 in hexadecimal, or None where none was asked for.
    """

    path: str
    size: int
    mtime_ns: int
    checksum: str | None


@dataclass(frozen=True)
class Manifest:
    """The shards of one source, in order.

    Attributes:
        kind: `tars`, or `table`: one csv, tsv or parquet file of (image path, caption).
        shards: the tars sorted by path, or the one table (the images that it names are not listed).
        image_column, caption_column: of a table.
    """

    kind: Literal["tars", "table"]
    shards: list[Shard]
    image_column: str = "image"
    caption_column: str = "caption"

    def save(self, path: Path) -> None:
        """Write as JSON."""
        with write_aside(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read what `save` wrote.

        Raises:
            ModeError: the file is missing or is not a manifest.
        """
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            shards = [Shard(**shard) for shard in content.pop("shards")]
            return cls(shards=shards, **content)
        except FileNotFoundError:
            raise ModeError(f"{path}: no such manifest") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ModeError(f"{path}: not a manifest", "delete it and run its stage again") from None


def build_manifest(source: SourceParams, root: Path) -> Manifest:
    """List the shards of a source.

    Args:
        source: `shards` is a folder (searched with its subfolders for `*.tar`), a tar, a glob of tars (`**` crosses
            folders), or a csv, tsv or parquet table.
        root: the project folder; relative paths start from it, and stay relative in the manifest.

    Raises:
        ModeError: no such path, no tar in the folder, no match of the glob, or a table without the named columns.
    """
    path = root / source.shards
    if path.is_dir():
        found = [str(Path(source.shards) / tar.relative_to(path)) for tar in path.rglob("*.tar") if tar.is_file()]
        if not found:
            raise ModeError(f"{source.shards}: no .tar in this folder", "sources.<name>.shards names a folder of tars")
    elif glob.has_magic(source.shards):
        names = glob.glob(source.shards, root_dir=root, recursive=True)  # noqa: PTH207 (pathlib takes no absolute ones)
        found = [name for name in names if (root / name).is_file()]
        if not found:
            raise ModeError(f"{source.shards}: no file matches", "brace ranges such as {0..9} are not globs")
    elif path.is_file():
        found = [source.shards]
    else:
        raise ModeError(f"{source.shards}: no such file or folder", "paths are relative to the project folder")

    others = sorted(name for name in found if not name.endswith(".tar"))
    if not others:
        return Manifest("tars", [_describe(name, root, source.checksum) for name in sorted(found)])
    if len(found) > 1 or not others[0].endswith(TABLE_SUFFIXES):
        raise ModeError(f"{others[0]}: neither a .tar nor a single table ({', '.join(TABLE_SUFFIXES)})")
    _check_columns(source, path if path.is_file() else root / others[0])
    shards = [_describe(others[0], root, source.checksum)]
    return Manifest("table", shards, source.image_column, source.caption_column)


def _describe(name: str, root: Path, checksum: bool) -> Shard:
    path = root / name
    status = path.stat()
    return Shard(name, status.st_size, status.st_mtime_ns, sha256_of(path) if checksum else None)


def _check_columns(source: SourceParams, path: Path) -> None:
    columns = _columns_of(path)
    for column in (source.image_column, source.caption_column):
        if column not in columns:
            has = ", ".join(f"'{name}'" for name in columns) or "no columns"
            raise ModeError(f"{source.shards}: no column '{column}': it has {has}", "set image_column, caption_column")


def _columns_of(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        from pyarrow import ArrowInvalid, parquet  # only a parquet table needs it, and importing it is slow

        try:
            return list(parquet.read_schema(path).names)
        except ArrowInvalid:
            raise ModeError(f"{path}: not a parquet file") from None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file, delimiter=SEPARATORS[path.suffix]), [])
    except UnicodeDecodeError:
        raise ModeError(f"{path}: not UTF-8 text") from None
