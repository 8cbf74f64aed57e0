"""Parquet files that tell damage: checksums of pages, of the footer, and of the whole file.

The first two are compared whenever a file is read, and cost next to nothing; the last is for `mode check`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from mode.checksums import ADVICE, SEAL, Seal
from mode.errors import ModeError, in_one_line

#: Of what says where the columns lie and how they are encoded, which the pages' checksums are not of.
_FOOTER = Seal("mode:footer")
#: A Parquet file ends with the footer's length (4 bytes) and this.
_MAGIC = b"PAR1"


@contextmanager
def write_sealed(
    path: Path, schema: pa.Schema, facts: Mapping[str, str] | None = None, **settings: Any
) -> Iterator[parquet.ParquetWriter]:
    """A writer of a Parquet file, which is complete when the block ends without an error.

    Args:
        path: the file.
        schema: its columns.
        facts: about it, for `facts_of`.
        settings: of `pyarrow.parquet.ParquetWriter`.
    """
    with parquet.ParquetWriter(path, schema, write_page_checksum=True, **settings) as writer:
        yield writer
        writer.add_key_value_metadata({**(facts or {}), "mode.footer": _FOOTER.blank, "mode.sha256": SEAL.blank})
    _FOOTER.fill(path, _footer_start(path))
    SEAL.fill(path)


def read_sealed(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a Parquet file, by default all; of one without checksums as well.

    Raises:
        ModeError: it is missing, no Parquet file, has no such columns, or is damaged where it was read.
    """
    with _one_line(path):
        check_footer(path)
        return parquet.read_table(path, columns=columns and list(columns), page_checksum_verification=True)


def iter_sealed(path: Path, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Columns of a Parquet file, at most so many rows at a time, read from the disk as one goes.

    Raises as `read_sealed`.
    """
    with _one_line(path):
        check_footer(path)
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(rows, columns=list(columns))


def rows_of(path: Path) -> int:
    """Rows of a Parquet file. Raises as `read_sealed`."""
    with _one_line(path):
        check_footer(path)
        rows: int = parquet.read_metadata(path).num_rows
        return rows


def facts_of(path: Path) -> dict[str, str]:
    """What the writer was told about a Parquet file, and more. Raises as `read_sealed`."""
    with _one_line(path):
        check_footer(path)
        metadata = parquet.read_metadata(path).metadata or {}
        return {key.decode(): value.decode() for key, value in metadata.items()}


def check_footer(path: Path) -> bool:
    """Compare the footer with its checksum; False where it has none. Raises `ModeError` if it is damaged."""
    return _FOOTER.check(path, _footer_start(path), later=SEAL)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever a Parquet file's reader raises, as a `ModeError`."""
    try:
        yield
    except ModeError:
        raise
    except FileNotFoundError:
        raise ModeError(f"{path}: no such file", "run the stage that makes it") from None
    except Exception as error:  # what the parser of a damaged file runs into is not to be foreseen
        raise ModeError(f"{path}: damaged, or no Parquet file: {in_one_line(error)}", ADVICE) from None


def _footer_start(path: Path) -> int:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        end = file.read()
    start = size - 8 - int.from_bytes(end[:4], "little")
    if end[4:] != _MAGIC or start < len(_MAGIC):
        raise ModeError(f"{path}: damaged, or no Parquet file", ADVICE)
    return start
