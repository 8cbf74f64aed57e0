"""Where the members of a tar lie.

The standard library's `tarfile` ends silently at a damaged header; here it is an error that says where, so that lost
pairs are never taken for the end of the shard.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from mode.data.shards.places import ByteFile

_BLOCK = 512
_REGULAR_TYPE = tarfile.REGTYPE[0]
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)


class Member(NamedTuple):
    """A regular file inside a tar: its bytes are `offset .. offset + size` of the tar."""

    name: str
    offset: int
    size: int


class DamagedTar(Exception):
    """The tar cannot be read from `offset` (bytes) on."""

    def __init__(self, detail: str, offset: int) -> None:
        super().__init__(detail)
        self.offset = offset


def members(tar: int | ByteFile, size: int) -> Iterator[Member]:
    """Regular files of a tar, in order, reading headers only.

    Long names of GNU and pax tars are followed; folders, links and devices are passed over.

    Args:
        tar: file descriptor, or anything that reads as `os.pread` does.
        size: of the tar in bytes.

    Raises:
        DamagedTar: after the members before the damage: a header whose checksum is wrong, a member that is cut off, or
            no end-of-archive marker.
    """
    read = partial(os.pread, tar) if isinstance(tar, int) else tar.read
    position = 0
    extended: dict[str, str] = {}  # from pax and GNU headers, for the member that follows
    while True:
        block = read(_BLOCK, position)
        if position and not block:
            raise DamagedTar("cut off: no end-of-archive marker", min(position, size))
        plain = None if extended else _plain_file(block)
        if plain is not None:
            name, length = plain
            content = position + _BLOCK
            if content + length > size:
                raise DamagedTar(f"cut off inside '{name}'", position)
            yield Member(name, content, length)
            position = content + -(-length // _BLOCK) * _BLOCK
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros: the end
            return
        except tarfile.HeaderError as error:
            if position == 0 and block[:2] == b"\x1f\x8b":
                raise DamagedTar("compressed with gzip: unpack it, offsets need a plain tar", 0) from None
            raise DamagedTar(f"{error} at byte {position}", position) from None

        content = position + _BLOCK
        try:
            length = int(extended.get("size", header.size))
        except ValueError:
            length = -1
        if length < 0:
            raise DamagedTar(f"bad size at byte {position}", position)
        following = content + -(-length // _BLOCK) * _BLOCK
        if content + length > size:
            raise DamagedTar(f"cut off inside '{header.name}'", position)
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended |= _pax_records(read(length, content), position)
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            extended["path"] = read(length, content).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
            pass
        else:
            if header.type in _REGULAR:
                yield Member(extended.get("path", header.name), content, length)
            elif header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
                following = content  # whatever size they state, nothing follows them
            extended = {}
        position = following


def _plain_file(block: bytes) -> tuple[str, int] | None:
    """Name and size, if this is the header of a regular file with a name of its own and nothing unusual about it.

    `TarInfo.frombuf` takes fifteen times as long, as it parses owner, times and device; it decides wherever this says
    `None`, hence also what is an error.
    """
    if len(block) != _BLOCK or block[156] != _REGULAR_TYPE or block[345]:
        return None
    try:
        checksum = int(block[148:156].partition(b"\0")[0], 8)
        length = int(block[124:136].partition(b"\0")[0], 8)
        name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    except ValueError:
        return None
    # The checksum is the sum of all bytes, its own field counted as eight spaces. Half of Adler-32 is 1 plus the sum
    # modulo 65,521, which 256 bytes do not reach.
    parts = (zlib.adler32(block[:148]), zlib.adler32(block[156:334]), zlib.adler32(block[334:]))
    total = (parts[0] & 0xFFFF) + (parts[1] & 0xFFFF) + (parts[2] & 0xFFFF) - 3 + 8 * 32
    return (name, length) if total == checksum and length >= 0 else None


def _pax_records(content: bytes, position: int) -> dict[str, str]:
    """Records of the form `LENGTH KEY=VALUE newline` (POSIX.1-2001, pax interchange format)."""
    records = {}
    while content:
        try:
            digits, _, _ = content.partition(b" ")
            length = int(digits)
            key, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
            if length < len(digits) + 3 or not equals:
                raise ValueError
        except ValueError:
            raise DamagedTar(f"bad pax header at byte {position}", position) from None
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        content = content[length:]
    return records
