"""What the pages of a parquet file unpack to, by the headers of the pages themselves.

Arrow takes memory for a page as its header says; the sizes in the file's footer may be any. A page's header is a struct
in Thrift's compact protocol (https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md), of
which no more is known here than where each value ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

#: Bytes of a header: what is read at first, which most fit into, and what Arrow takes at most.
_HEADER, _LARGEST_HEADER = 256, 2**24
#: Structs within structs, at most: statistics of a data page are the second.
_DEEPEST = 8
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_NUMBERS = (4, 5, 6)
#: Fields of a page's header; and those of both kinds of data page in it, each with its field for the encoding.
_UNPACKED, _PACKED, _DATA_PAGES = 2, 3, {5: 2, 8: 4}
#: Encodings by parquet's numbers: values one after the other, or numbers of what the dictionary has.
PLAIN = (0, 2, 8)


class Page(NamedTuple):
    """A page of a column.

    Attributes:
        size: bytes that it unpacks to.
        encoding: parquet's number; 0 of a dictionary.
    """

    size: int
    encoding: int


def pages_of(source: Any, column: Any) -> Iterator[Page]:
    """Pages of a column of a row group.

    Args:
        source: the file, open (`pyarrow.NativeFile`).
        column: `pyarrow.parquet.ColumnChunkMetaData`.

    Raises:
        pa.ArrowInvalid: a header is damaged.
    """
    position = column.data_page_offset
    if column.dictionary_page_offset:
        position = min(position, column.dictionary_page_offset)
    end = position + column.total_compressed_size
    while position < end:
        header, length = _header_at(source, position)
        size, packed = header.get(_UNPACKED), header.get(_PACKED)
        if not (isinstance(size, int) and isinstance(packed, int) and min(size, packed) >= 0):
            raise pa.ArrowInvalid(f"bad page header at byte {position}")
        data = [(each, field) for kind, field in _DATA_PAGES.items() if isinstance(each := header.get(kind), dict)]
        yield Page(size, next((each.get(field, 0) for each, field in data), 0))
        position += length + packed


def _header_at(source: Any, position: int) -> tuple[dict[int, Any], int]:
    """The fields of the header at a byte, and its length."""
    length = _HEADER
    while True:
        source.seek(position)
        content = source.read(length)
        try:
            return _Struct(content).fields()
        except IndexError:
            if len(content) < length or length >= _LARGEST_HEADER:
                raise pa.ArrowInvalid(f"bad page header at byte {position}") from None
            length *= 16


class _Struct:
    """Reads a struct from its bytes; IndexError if they are too few, or no struct."""

    def __init__(self, content: bytes) -> None:
        self._content, self._place = content, 0

    def fields(self) -> tuple[dict[int, Any], int]:
        """Numbers, and structs in it, by the number of their field; and the bytes that it takes."""
        return self._struct(0), self._place

    def _struct(self, depth: int) -> dict[int, Any]:
        if depth > _DEEPEST:
            raise IndexError
        found: dict[int, Any] = {}
        number = 0
        while first := self._byte():
            step, kind = first >> 4, first & 15
            number = number + step if step else self._number()
            found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _NUMBERS:
            return self._number()
        if kind == _STRUCT:
            return self._struct(depth + 1)
        if kind in (_LIST, _SET):
            first = self._byte()
            count, of = first >> 4, first & 15
            for _ in range(self._varint() if count == 15 else count):
                self._value(_BYTE if of in (_TRUE, _FALSE) else of, depth + 1)
            return None
        if kind not in (_BYTE, _DOUBLE, _BINARY):
            raise IndexError
        length = {_BYTE: 1, _DOUBLE: 8}.get(kind) or self._varint()
        self._place += length
        if self._place > len(self._content):
            raise IndexError
        return None

    def _number(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise IndexError

    def _byte(self) -> int:
        byte = self._content[self._place]
        self._place += 1
        return byte
