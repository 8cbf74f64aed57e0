"""What the pages of a parquet file say of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from mode.data.shards.bounded import iter_rows, texts
from mode.data.shards.pages import Page, pages_of

#: Columns that may not be null: a page then holds values and nothing else.
SCHEMA = pa.schema([pa.field("key", pa.int64(), nullable=False), pa.field("text", pa.string(), nullable=False)])


def written(path: Path, rows: int = 10, **options: Any) -> tuple[Any, list[Any]]:
    """A table of numbers and texts of five letters, open, and the columns of its one row group."""
    table = pa.table([[*range(rows)], [f"{n:05d}" for n in range(rows)]], schema=SCHEMA)
    parquet.write_table(table, path, **{"use_dictionary": False, "compression": "none", **options})
    group = parquet.read_metadata(path).row_group(0)
    return pa.OSFile(str(path)), [group.column(number) for number in range(2)]


def test_sizes_are_those_of_the_values(tmp_path: Path) -> None:
    """A number has 8 bytes, a text 4 for its length and then its own."""
    source, columns = written(tmp_path / "t.parquet")
    assert [list(pages_of(source, column)) for column in columns] == [[Page(80, 0)], [Page(10 * 9, 0)]]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_page_is_found(tmp_path: Path, version: str, compression: str) -> None:
    source, [numbers, _] = written(
        tmp_path / "t.parquet", 1_000, data_page_version=version, compression=compression, data_page_size=800,
        write_batch_size=100,
    )  # fmt: skip
    assert list(pages_of(source, numbers)) == [Page(800, 0)] * 10


def test_a_dictionary_is_a_page(tmp_path: Path) -> None:
    source, [_, column] = written(tmp_path / "t.parquet", use_dictionary=["text"])
    dictionary, numbers = pages_of(source, column)
    assert dictionary == Page(90, 0)
    assert numbers.encoding == 8


@pytest.mark.parametrize(("encoding", "number"), [("DELTA_LENGTH_BYTE_ARRAY", 6), ("DELTA_BYTE_ARRAY", 7)])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_texts_in_other_encodings_are_read(tmp_path: Path, version: str, encoding: str, number: int) -> None:
    source, [_, column] = written(tmp_path / "t.parquet", column_encoding={"text": encoding}, data_page_version=version)
    assert [page.encoding for page in pages_of(source, column)] == [number]
    rows = iter_rows(tmp_path / "t.parquet", "t", ["key", "text"], texts)
    assert list(rows) == [(f"{n}", f"{n:05d}") for n in range(10)]


class Column:
    """Where the pages of a column are."""

    dictionary_page_offset, data_page_offset, total_compressed_size = None, 0, 1_000


#: By hand: type 0 (15 00), unpacked 50 (15 64), packed 60 (15 78); a struct, empty or with an encoding; the end (00).
HEADER = b"\x15\x00\x15\x64\x15\x78"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (HEADER + b"\x2c\x15\x02\x15\x0e\x00\x00", Page(50, 7)),  # field 5: 1 value, encoding 7
        (HEADER + b"\x5c\x15\x02\x00\x00", Page(50, 0)),  # field 8, without its encoding
        (HEADER + b"\x15\x01\x00", Page(50, 0)),  # a checksum
        # Fields that nobody knows: a list of truths, a set of 16 numbers, a double, a byte, a text; one far off.
        (HEADER + b"\x69\x21\x01\x02\x1a\xf5\x10" + b"\x02" * 16 + b"\x17" + bytes(8) + b"\x13\x07\x18\x02ab\x00",
         Page(50, 0)),
        (HEADER + b"\x05\xd0\x0f\x02\x00", Page(50, 0)),
        (HEADER[:4] + b"\x00", None),  # no packed size
        (b"\x15\x00\x15\x63\x15\x78\x00", None),  # unpacked -50
        (b"\x15\x00\x18\x01a\x15\x78\x00", None),  # a text as size
        (HEADER + b"\x1c" * 100, None),  # structs in structs
        (HEADER + b"\x18\xff\xff\xff\xff\x0f", None),  # a text of 4 GB
        (HEADER + b"\x1b\x00\x00", None),  # a map, which no page has
        (HEADER + b"\x16" + b"\xff" * 20, None),  # a number without an end
        (b"", None),
    ],
)  # fmt: skip
def test_headers(header: bytes, expected: Page | None) -> None:
    source = pa.BufferReader(header + bytes(60 if expected else 0))
    pages = pages_of(source, Column())
    if expected is None:
        with pytest.raises(pa.ArrowInvalid, match="bad page header at byte 0"):
            next(pages)
    else:
        assert next(pages) == expected
        with pytest.raises(pa.ArrowInvalid, match=f"bad page header at byte {len(header) + 60}"):
            next(pages)


def test_a_header_of_many_bytes(tmp_path: Path) -> None:
    long = HEADER + b"\x18\xd0\x86\x03" + b"x" * 50_000 + b"\x00"
    assert next(pages_of(pa.BufferReader(long), Column())) == Page(50, 0)
