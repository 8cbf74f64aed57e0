"""Parquet files of somebody else's, read in bounded memory: 48 KB of one can state 2.4 GB of the same long text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from mode.data.shards.pages import PLAIN, pages_of
from mode.errors import ModeError, in_one_line

#: How much a parquet file may grow to: this many times its size (paths and captions of real tables shrink to a tenth),
#: and what any file may. A row counts as what its account takes if it is bad.
_GROWTH, _FREE_GROWTH, _ROW = 200, 64 * 2**20, 64
#: Rows that are unpacked together, and the bytes that these may take where each may be as long as its page.
_ROWS, _TOGETHER = 65_536, 2**26


def iter_rows(
    file: Path | pa.Buffer, name: str, columns: Sequence[str], values: Callable[[Any], list[Any]]
) -> Iterator[tuple[Any, ...]]:
    """Rows of a parquet file, one after the other.

    Args:
        file: where it lies, or its content.
        name: of the file, in errors.
        columns: to read, in the order in which a row has them.
        values: what is made of a part of a column, such as `texts` or `plain_values`.

    Raises:
        ModeError: it is damaged or no parquet file, has no such columns, or unpacks to far more than it takes.
    """
    size = file.stat().st_size if isinstance(file, Path) else file.size
    left = _FREE_GROWTH + _GROWTH * size

    def opened() -> Any:
        return file if isinstance(file, Path) else pa.BufferReader(file)

    try:
        metadata = parquet.read_metadata(opened())
        names = metadata.schema.to_arrow_schema().names
        if missing := [column for column in columns if column not in names]:
            raise ModeError(f"{name}: no column '{missing[0]}'", f"it has {', '.join(names)[:500]}")
        with pa.OSFile(str(file)) if isinstance(file, Path) else pa.BufferReader(file) as source:
            longest = _check_growth(name, source, metadata, columns, left)
        rows = max(1, min(_ROWS, _TOGETHER // max(longest.values(), default=1)))
        # A text that many rows share is kept once, as it is in the file.
        paths = {metadata.schema.column(number).path for number in range(metadata.num_columns)}
        simple = ({*columns} & paths) - {*longest}
        with parquet.ParquetFile(opened(), read_dictionary=sorted(simple)) as reader:
            for block in reader.iter_batches(rows, columns=list(dict.fromkeys(columns))):
                for row in zip(*(values(block.column(column)) for column in columns), strict=True):
                    left -= sum(len(value) for value in row if isinstance(value, str)) + _ROW
                    if left < 0:
                        raise _grown(name)
                    yield row
    except (pa.ArrowException, OSError) as error:
        raise ModeError(f"{name}: cannot be read: {in_one_line(error)}", "is it damaged? fetch it again") from None


def texts(column: Any) -> list[str | None]:
    """The texts of a column; None where there is none, or what stands there is neither a text nor a number."""
    if pa.types.is_dictionary(column.type):
        values = [*texts(column.dictionary), None]
        numbers = column.indices.fill_null(len(values) - 1).to_numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(values):  # as in a damaged file
            raise pa.ArrowInvalid("a number that the dictionary does not have")
        return [values[number] for number in numbers.tolist()]
    if pa.types.is_integer(column.type):
        return [None if value is None else str(value) for value in column.to_pylist()]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = column.cast(pa.large_binary())
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return [None] * len(column)
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in column.to_pylist()]


def plain_values(column: Any) -> list[str | float | bool | None]:
    """The texts, numbers, and truths of a column; None where there is nothing, or something else."""
    kind = column.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        numbers: list[str | float | bool | None] = column.to_pylist()
        return numbers
    if pa.types.is_decimal(kind):
        return [None if value is None else float(value) for value in column.to_pylist()]
    return [*texts(column)]


def _check_growth(name: str, source: Any, metadata: Any, columns: Sequence[str], most: int) -> dict[str, int]:
    """Refuse a file with a row group that is too large: a whole one is unpacked at a time.

    Returns:
        Of each column whose texts are not simply one after the other, bytes of its longest page: of each text, it may
        have only what differs from the one before, so that any number of them is as long as the page.
    """
    longest: dict[str, int] = {}
    for number in range(metadata.num_row_groups):
        group, left = metadata.row_group(number), most
        parts = [group.column(each) for each in range(group.num_columns)]
        for part in parts:
            path = part.path_in_schema
            if not any(path == column or path.startswith(f"{column}.") for column in columns):
                continue
            for page in pages_of(source, part):
                left -= page.size
                if left < 0:
                    raise _grown(name)
                if page.encoding not in PLAIN:
                    longest[path] = max(longest.get(path, 1), page.size)
    return longest


def _grown(name: str) -> ModeError:
    advice = "its rows repeat a long text: is that what you meant? a csv has no such limit"
    return ModeError(f"{name}: unpacks to more than {_GROWTH} times its size", advice)
