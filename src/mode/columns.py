"""Tables whose columns lie in files of their own, of which no more is in memory than is asked for.

A column of numbers is an `.npy` file; one of texts is `NAME.utf8`, all of them one after the other, with the byte at
which each begins in `NAME.offsets.npy` (int64, one more than there are texts; Arrow's layout of strings).

Rows are read with `pread` and not through a mapping: the system maps up to 64 kB around each row that is touched, which
counts as the memory of a process that alone uses the file, and a mapped file that is cut short ends the process. What
is read stays in the system's cache, which all processes share.
"""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mode.checksums import ADVICE
from mode.errors import ModeError, in_one_line

#: Rows that are read together where all are read.
BLOCK = 65_536
#: Rows that lie anywhere: so many are looked at together, and where they lie in so few bytes these are read at once.
_PICKED, _DENSE = 4_096, 1 << 18
#: Bytes of one text, at most: a longer one is damage.
_LONGEST = 1 << 24

#: Numbers by row, in a file or in memory.
Numbers: TypeAlias = "Column | NDArray[Any]"
Rows: TypeAlias = "NDArray[np.int64] | Sequence[int]"


class Column:
    """A column of numbers in a file, which is read where it is indexed: by a row, a slice or an array of rows.

    Args:
        path: the `.npy` file.
        kind: type that its numbers have to have.

    Raises:
        ModeError: it is missing, of another type, or not of the length that it has to be. When it is read: it has been
            cut short since.
        IndexError: when it is read, a row that is not there.

    Example:
        >>> np.save("image.npy", np.arange(5) * 10)
        >>> Column(Path("image.npy"), np.int64)[[1, 4]].tolist()
        [10, 40]
    """

    def __init__(self, path: Path, kind: type[np.generic] | np.dtype[Any]) -> None:
        self._path, self.dtype = path, np.dtype(kind)
        self._file = _File(path)
        self._start, self._length = self._read_header()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, rows: int | slice | Rows) -> Any:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(self._length)
            return self._range(start, max(start, stop))[::step] if step > 0 else self[np.arange(start, stop, step)]
        if isinstance(rows, int | np.integer):
            row = int(rows) + (self._length if rows < 0 else 0)
            self._check(row, row)
            return self._range(row, row + 1)[0]
        return self._picked(np.asarray(rows), 1)[:, 0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)

    def spans(self, rows: Rows) -> NDArray[Any]:
        """What stands in each of these rows and in the one after it, [n, 2]."""
        return self._picked(np.asarray(rows), 2)

    def _picked(self, rows: NDArray[Any], width: int) -> NDArray[Any]:
        """`width` numbers from each row on, [n, width]."""
        found = np.empty((len(rows), width), self.dtype)
        if len(rows) and rows.dtype.kind not in "iu":
            raise IndexError(f"{self._path}: rows of type {rows.dtype}")
        for start in range(0, len(rows), _PICKED):
            some = rows[start : start + _PICKED].astype(np.int64)
            first, last = int(some.min()), int(some.max())
            self._check(first, last + width - 1)
            if (last - first) * self.dtype.itemsize <= _DENSE:
                near = self._range(first, last + width)
                found[start : start + len(some)] = near[(some - first)[:, None] + np.arange(width)]
            else:
                size, offsets = width * self.dtype.itemsize, self._start + some * self.dtype.itemsize
                content = b"".join([self._file.read(size, offset) for offset in offsets.tolist()])
                found[start : start + len(some)] = self._numbers(content, len(some) * width).reshape(-1, width)
        return found

    def _range(self, start: int, stop: int) -> NDArray[Any]:
        size = self.dtype.itemsize
        return self._numbers(self._file.read((stop - start) * size, self._start + start * size), stop - start)

    def _numbers(self, content: bytes, count: int) -> NDArray[Any]:
        if len(content) != count * self.dtype.itemsize:
            raise ModeError(f"{self._path}: damaged: it ends before its last row", ADVICE)
        return np.frombuffer(content, self.dtype)

    def _check(self, first: int, last: int) -> None:
        if first < 0 or last >= self._length:
            raise IndexError(f"{self._path}: row {first if first < 0 else last:,} of {self._length:,}")

    def _read_header(self) -> tuple[int, int]:
        """Where the numbers begin, and how many there are."""
        try:
            header = io.BytesIO(self._file.read(4_096, 0))
            np.lib.format.read_magic(header)
            shape, fortran, kind = np.lib.format.read_array_header_1_0(header)
            if len(shape) != 1 or fortran or kind != self.dtype:
                raise ValueError(f"{kind} {list(shape)} instead of {self.dtype} [rows]")
            start, length = header.tell(), int(shape[0])
            if self._file.size != start + length * self.dtype.itemsize:
                raise ValueError("it is not of the length that it has to be")
        except Exception as error:  # what numpy's parser of a damaged header runs into is not to be foreseen
            raise ModeError(f"{self._path}: damaged, or not a column: {in_one_line(error)}", ADVICE) from None
        return start, length


class Texts:
    """A column of texts in files, which is read where it is indexed.

    Args:
        stem: path of the files without their suffixes.

    Raises:
        ModeError: a file is missing, or not of the length that it has to be. When it is read: an offset or a text is
            damaged.
        IndexError: when it is read, a row that is not there.
    """

    def __init__(self, stem: Path) -> None:
        self._path = Path(f"{stem}.utf8")
        self._offsets, self._file = Column(Path(f"{stem}.offsets.npy"), np.int64), _File(self._path)
        self._size = self._file.size
        if not len(self._offsets) or self._offsets[0] != 0 or self._offsets[-1] != self._size:
            raise ModeError(f"{self._path}: damaged: not the texts that its offsets are of", ADVICE)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        return self.take([row])[0]

    def take(self, rows: Rows) -> list[str]:
        """Texts of these rows, in the order asked for."""
        spans = self._offsets.spans(rows)
        lengths = self._lengths(spans)
        places = zip(lengths.tolist(), spans[:, 0].tolist(), strict=True)
        return self._decoded(b"".join([self._file.read(length, place) for length, place in places]), lengths)

    def blocks(self, size: int = BLOCK) -> Iterator[list[str]]:
        """All of them, so many at a time."""
        for start in range(0, len(self), size):
            offsets = self._offsets[start : start + size + 1]
            lengths = self._lengths(np.stack([offsets[:-1], offsets[1:]], axis=1))
            yield self._decoded(self._file.read(int(lengths.sum()), int(offsets[0])), lengths)

    def _lengths(self, spans: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of texts that begin and end there, after a look that these are in the file."""
        lengths: NDArray[np.int64] = spans[:, 1] - spans[:, 0]
        if len(spans) and (
            spans.min() < 0 or spans.max() > self._size or not 0 <= lengths.min() <= lengths.max() <= _LONGEST
        ):
            raise ModeError(f"{self._path}: damaged: an offset is of no text", ADVICE)
        return lengths

    def _decoded(self, content: bytes, lengths: NDArray[np.int64]) -> list[str]:
        ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        try:
            if len(content) != ends[-1]:
                raise ValueError("it ends before its last text")
            texts = pa.LargeStringArray.from_buffers(len(lengths), pa.py_buffer(ends), pa.py_buffer(content))
            texts.validate(full=True)  # that they are UTF-8
        except (ValueError, pa.ArrowException) as error:
            raise ModeError(f"{self._path}: damaged: {in_one_line(error)}", ADVICE) from None
        listed: list[str] = texts.to_pylist()
        return listed


class ColumnsWriter:
    """Writes a table column by column, a part at a time.

    Args:
        folder: to write into; it is made if it is not there.
        schema: of the parts: numbers and strings, none of them null.
    """

    def __init__(self, folder: Path, schema: pa.Schema, files: ExitStack) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._schema, self._rows = schema, 0
        self._numbers: dict[str, _NumbersFile] = {}
        self._texts: dict[str, BinaryIO] = {}
        self._ends: dict[str, int] = {}
        for field in schema:
            if pa.types.is_string(field.type):
                self._texts[field.name] = files.enter_context((folder / f"{field.name}.utf8").open("wb"))
                offsets = _NumbersFile(files.enter_context((folder / f"{field.name}.offsets.npy").open("wb")), np.int64)
                offsets.write(np.zeros(1, np.int64))
                self._numbers[field.name], self._ends[field.name] = offsets, 0
            else:
                file = files.enter_context((folder / f"{field.name}.npy").open("wb"))
                self._numbers[field.name] = _NumbersFile(file, field.type.to_pandas_dtype())

    def write(self, part: pa.Table) -> None:
        """Add rows."""
        for field in self._schema:
            for chunk in part[field.name].chunks:
                if field.name in self._texts:
                    self._write_texts(field.name, chunk)
                else:
                    self._numbers[field.name].write(chunk.to_numpy(zero_copy_only=False))

    def finish(self) -> None:
        """Write how many rows there are."""
        for numbers in self._numbers.values():
            numbers.finish()

    def _write_texts(self, name: str, chunk: pa.Array) -> None:
        offsets = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset :][: len(chunk) + 1].astype(np.int64)
        if len(chunk):
            self._texts[name].write(chunk.buffers()[2].slice(int(offsets[0]), int(offsets[-1] - offsets[0])))
            self._numbers[name].write(offsets[1:] - offsets[0] + self._ends[name])
            self._ends[name] += int(offsets[-1] - offsets[0])


@contextmanager
def write_columns(folder: Path, schema: pa.Schema) -> Iterator[ColumnsWriter]:
    """A writer of a table, which is complete when the block ends without an error. Memory: one part.

    Args:
        folder: to write into; it is made if it is not there.
        schema: numbers and strings, none of them null.
    """
    with ExitStack() as files:
        writer = ColumnsWriter(folder, schema, files)
        yield writer
        writer.finish()


def open_columns(folder: Path, schema: pa.Schema) -> dict[str, Column | Texts]:
    """Columns of a table that `write_columns` wrote, all equally long.

    Args:
        folder: of the table.
        schema: columns that it has to have; others are not looked at.

    Raises:
        ModeError: one is missing or damaged, as far as its header and its length say; or they are of unequal length.
    """
    columns: dict[str, Column | Texts] = {
        field.name: Texts(folder / field.name)
        if pa.types.is_string(field.type)
        else Column(folder / f"{field.name}.npy", field.type.to_pandas_dtype())
        for field in schema
    }
    if len({len(column) for column in columns.values()}) > 1:
        raise ModeError(f"{folder}: damaged: its columns are of unequal length", ADVICE)
    return columns


def spans(numbers: Numbers, rows: Rows) -> NDArray[Any]:
    """As `Column.spans`, also of numbers in memory."""
    if isinstance(numbers, Column):
        return numbers.spans(rows)
    rows = np.asarray(rows, np.int64)
    return np.stack([numbers[rows], numbers[rows + 1]], axis=1)


def blocks_of(numbers: Numbers, size: int = BLOCK) -> Iterator[NDArray[Any]]:
    """All of them, so many at a time."""
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


class _NumbersFile:
    """An `.npy` file of one dimension whose length is known in the end."""

    def __init__(self, file: BinaryIO, kind: Any) -> None:
        self._file, self._kind, self._length = file, np.dtype(kind), 0
        self._write_header()

    def write(self, numbers: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(numbers, self._kind).data)
        self._length += len(numbers)

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        """As long as any other: numpy leaves room for the longest number of rows."""
        about = {"descr": np.lib.format.dtype_to_descr(self._kind), "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, about)


class _File:
    """A file that is read by place, from any thread and by forked processes too; it is closed with this object."""

    def __init__(self, path: Path) -> None:
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ModeError(f"{path}: no such file", "run the stage that makes it") from None
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, size: int, place: int) -> bytes:
        """So many bytes from a place on, or as many as there are: one call of the system gives no more than 2 GiB."""
        parts = []
        while size > 0 and (part := os.pread(self._descriptor, min(size, 1 << 30), place)):
            parts.append(part)
            size, place = size - len(part), place + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
