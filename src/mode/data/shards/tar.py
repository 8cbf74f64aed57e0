"""Where the members of a tar lie, and what of its bytes is damage.

The standard library's `tarfile` ends silently at a damaged header, and at the first block of zeros. Here every byte is
a member's, padding, or damage that is reported; after damage reading goes on at the next header.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from mode.data.shards.places import ByteFile

BLOCK = 512
_REGULAR_TYPE = tarfile.REGTYPE[0]
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
#: Where a header has its magic word, which is the same in all formats but the oldest.
_MAGIC, _MAGIC_AT = b"ustar", 257

#: Where a header of a file with holes says that another follows, with more of them; and where that one says so.
_MORE_HOLES, _STILL_MORE = 482, 504
#: What an archive is filled up with zeros to: two blocks at its end, then a whole number of records. 20 blocks are a
#: record to every writer that is not told otherwise; the powers of two are what people tell GNU tar (up to 1 MiB).
_RECORDS = (tarfile.RECORDSIZE, *(BLOCK << power for power in range(12)))
#: As many zeros at the end of a file are padding whatever the file's size is; more have to fill up a record.
_PADDING = 2 * tarfile.RECORDSIZE
#: Bytes of the extended headers (pax) and long names of one member, with the headers of their own. Some hold attributes
#: of 64 KiB; a megabyte is an attack on memory.
_LARGEST_EXTENSION = 2**20
#: Bytes looked through at once for the next header, or the end of zeros.
_AT_ONCE = 2**20
_ZEROS = bytes(_AT_ONCE)


class Member(NamedTuple):
    """A regular file inside a tar: its bytes are `offset .. offset + size` of the tar."""

    name: str
    offset: int
    size: int


class DamagedTar(Exception):
    """`size` bytes of the tar from `offset` on are neither members nor padding."""

    def __init__(self, detail: str, offset: int, size: int = 0, *, resume: int = 0) -> None:
        super().__init__(detail)
        self.offset, self.size = offset, size
        self.resume = resume or offset + 1  # where the next header may be at the earliest


def members(tar: int | ByteFile, size: int) -> Iterator[Member]:
    """Regular files of a tar without damage, in order, reading headers only; see `Tar`.

    Raises:
        DamagedTar: the first damage, after the members before it.
    """
    reader = Tar(tar, size)
    for member in reader:
        if reader.damage:
            break
        yield member
    if reader.damage:
        raise reader.damage[0]


class Tar:
    """Regular files of a tar, in order, reading headers only, with an account of all other bytes.

    Long names of GNU and pax tars are followed; folders, links and devices are passed over. Archives that were written
    one after the other into a file (`cat a.tar b.tar`) are read one after the other. After damage the next header is
    looked for, anywhere, so that the members behind it are found; inside a member that is whole nobody looks for one.

    Two members beside damage may not be what they seem: the first after it may have lost the header with its long name,
    and is passed over if its name may be a shortened one; the last before it may have been cut off and run into what
    follows. If a header is found inside it, that is certain: it is in `cut`, and reading goes on at that header. If
    none is, it is in `doubtful`, for those who know what its content has to look like.

    Args:
        tar: file descriptor, or anything that reads as `os.pread` does.
        size: of the tar in bytes.

    Attributes:
        archive: number of the archive that the last member given belongs to, 0 for the first.
        header: the block before that member's content.
        damage: what has been found so far: a header whose checksum is wrong, a member that is cut off, zeros that are
            no padding, bytes after the end, or no end-of-archive marker (0 bytes).
        cut, doubtful: members that were given before damage was found behind them.
    """

    def __init__(self, tar: int | ByteFile, size: int) -> None:
        self._read: Callable[[int, int], bytes] = partial(os.pread, tar) if isinstance(tar, int) else tar.read
        self._size = size
        self._from = 0  # where the present archive begins
        self._position = 0
        self._last: Member | None = None
        self.archive = 0
        self.header = b""
        self.damage: list[DamagedTar] = []
        self.cut: list[Member] = []
        self.doubtful: list[Member] = []

    def __iter__(self) -> Iterator[Member]:
        while True:
            try:
                yield from self._members(self._position)
            except DamagedTar as damage:
                following = self._after(damage)
            else:
                following = self._after_zeros(self._position)
            if following is None:
                return
            self._position, self._last = following, None

    def _members(self, position: int) -> Iterator[Member]:
        """Members from a header on, until a block of zeros, at which `_position` then is."""
        read, size = self._read, self._size
        extended: dict[str, str] = {}  # from pax and GNU headers, for the member that follows
        # Of the first of these headers, and of the last, behind which reading goes on after damage.
        begin = newest = position
        while True:
            block = read(BLOCK, position)
            plain = None if extended else _plain_file(block)
            if plain is not None:
                name, length = plain
                content = position + BLOCK
                if content + length > size:
                    raise DamagedTar(f"cut off inside '{name}'", position, resume=content)
                self.header = block
                self._last = member = Member(name, content, length)
                yield member
                position = content + -(-length // BLOCK) * BLOCK
                continue
            if not extended:
                begin = newest = position
            if position and not block:
                raise DamagedTar("cut off: no end-of-archive marker", min(begin, size), resume=newest + 1)
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # a block of zeros: the end
                if extended:
                    raise DamagedTar(f"a name without a member at byte {begin}", begin, resume=newest + 1) from None
                self._position = position
                return
            except tarfile.HeaderError as error:
                if position == 0 and block[:2] == b"\x1f\x8b":
                    fault = "compressed with gzip: unpack it, offsets need a plain tar"
                    raise DamagedTar(fault, 0, resume=size) from None
                raise DamagedTar(f"{error} at byte {position}", begin, resume=newest + 1) from None

            content = position + BLOCK
            if header.type == tarfile.GNUTYPE_SPARSE:
                content += self._sparse_headers(block, content)
            try:
                length = int(extended.get("size", header.size))
            except ValueError:
                length = -1
            if length < 0:
                raise DamagedTar(f"bad size at byte {position}", begin, resume=content)
            following = content + -(-length // BLOCK) * BLOCK
            if content + length > size:
                raise DamagedTar(f"cut off inside '{header.name}'", begin, resume=content)
            if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
                if following - begin > _LARGEST_EXTENSION:
                    fault = f"{following - begin} bytes of names or attributes at byte {begin}"
                    raise DamagedTar(fault, begin, resume=following)
                newest = position
                if header.type == tarfile.GNUTYPE_LONGNAME:
                    extended["path"] = read(length, content).rstrip(b"\0").decode("utf-8", "surrogateescape")
                else:
                    extended |= _pax_records(read(length, content), begin, position)
            elif header.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                pass
            else:
                if header.type in _REGULAR:
                    self.header = block
                    self._last = member = Member(extended.get("path", header.name), content, length)
                    yield member
                elif header.type in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE):
                    following = content  # whatever size they state, nothing follows them
                extended = {}
            position = following

    def _sparse_headers(self, block: bytes, position: int) -> int:
        """Bytes of the headers that follow the one of a GNU tar's file with holes, if it has many of them."""
        begin, more = position, block[_MORE_HOLES]
        while more and len(block := self._read(BLOCK, position)) == BLOCK:
            position, more = position + BLOCK, block[_STILL_MORE]
        return position - begin

    def _after(self, damage: DamagedTar) -> int | None:
        """Where to go on after damage, which is noted with its size; None if nothing follows."""
        # A header where the last member ends says that this is whole.
        last = None if _is_header(self._read(BLOCK, damage.offset)) else self._last
        begin = damage.offset
        following = last and self._header_in(last.offset, begin)
        if last and following is not None and following < last.offset + last.size:
            self.cut.append(last)
            begin = last.offset - BLOCK
        elif last and begin < self._size:
            self.doubtful.append(last)
        if following is None:
            following = self._header_in(damage.resume, self._size)
        begin = min(begin, self._size if following is None else following)
        while following is not None and (past := self._past_shortened(following)):
            following = self._header_in(past, self._size)
        damage.offset, damage.size = begin, (self._size if following is None else following) - begin
        self.damage.append(damage)
        return following

    def _after_zeros(self, position: int) -> int | None:
        """Where the next archive begins, if one follows the zeros at `position`."""
        end = position
        while end < self._size:
            chunk = self._read(_AT_ONCE, end)
            if chunk != _ZEROS[: len(chunk)] or not chunk:
                end += len(chunk) - len(chunk.lstrip(b"\0"))
                break
            end += len(chunk)
        if end >= self._size:
            if not self._is_padding(position, self._size):
                fault = f"{self._size - position} zero bytes at the end, more than padding"
                return self._after(DamagedTar(fault, position, resume=self._size))
            return None
        end -= (end - position) % BLOCK  # the block that is not all zero
        if not self._is_padding(position, end):
            return self._after(DamagedTar(f"a hole of {end - position} bytes at byte {position}", position, resume=end))
        if not _is_header(self._read(BLOCK, end)):
            self._last = None  # it ended well
            return self._after(DamagedTar(f"neither zeros nor a header at byte {end}", end))
        self.archive, self._from = self.archive + 1, end
        return end

    def _is_padding(self, begin: int, end: int) -> bool:
        """Whether zeros are an end-of-archive marker with what fills up the last record, and not a hole."""
        zeros = end - begin
        if end == self._size and zeros <= _PADDING and begin > self._from:
            return True
        return zeros >= 2 * BLOCK and any(
            (end - self._from) % record == 0 and zeros < record + 2 * BLOCK for record in _RECORDS
        )

    def _header_in(self, begin: int, end: int) -> int | None:
        """The first header in a part of the file: with the magic word anywhere, without it where blocks begin."""
        aligned = -(-(begin - self._from) // BLOCK) * BLOCK + self._from
        while begin < end:
            chunk = self._read(_AT_ONCE + BLOCK, begin)
            last = min(_AT_ONCE, end - begin, len(chunk) - BLOCK + 1)  # places in this chunk, those before it
            found = [
                place
                for place in (_first_with_magic(chunk, last), _first_aligned(chunk, aligned - begin, last))
                if place is not None
            ]
            if found:
                return begin + min(found)
            begin += _AT_ONCE
            aligned += _AT_ONCE
        return None

    def _past_shortened(self, position: int) -> int | None:
        """The end of a header whose name may be what is left of a longer one that stood in a header before."""
        block = self._read(BLOCK, position)
        name = block[:100].partition(b"\0")[0]  # Python's pax headers have ? for letters that are not ASCII
        return position + BLOCK if len(name) == 100 or b"?" in name else None


def _first_with_magic(chunk: bytes, end: int) -> int | None:
    """The first place before `end` at which a header with the magic word begins."""
    place = chunk.find(_MAGIC, _MAGIC_AT)
    while place >= 0 and place - _MAGIC_AT < end:
        begin = place - _MAGIC_AT
        if _is_header(chunk[begin : begin + BLOCK]):
            return begin
        place = chunk.find(_MAGIC, place + 1)
    return None


def _first_aligned(chunk: bytes, begin: int, end: int) -> int | None:
    """The first of the places `begin`, `begin + 512` ... before `end` at which the header of a regular file begins."""
    kinds = chunk[begin + 156 : end + 156 : BLOCK]
    number = kinds.find(tarfile.REGTYPE)
    while number >= 0:
        place = begin + number * BLOCK
        if place < end and _plain_file(chunk[place : place + BLOCK]):
            return place
        number = kinds.find(tarfile.REGTYPE, number + 1)
    return None


def _is_header(block: bytes) -> bool:
    try:
        int(block[148:156].partition(b"\0")[0], 8)  # of what only looks like one, nearly all ends here
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (ValueError, tarfile.HeaderError):
        return False
    return True


def _plain_file(block: bytes) -> tuple[str, int] | None:
    """Name and size, if this is the header of a regular file with a name of its own and nothing unusual about it.

    `TarInfo.frombuf` takes fifteen times as long, as it parses owner, times and device; it decides wherever this says
    `None`, hence also what is an error.
    """
    # Sizes and checksums end with a zero where every usual writer has it.
    if len(block) != BLOCK or block[156] != _REGULAR_TYPE or block[345] or block[135] or block[154]:
        return None
    try:
        checksum, length = int(block[148:154], 8), int(block[124:135], 8)
        name = block[: end if (end := block.find(0, 0, 100)) >= 0 else 100].decode("utf-8", "surrogateescape")
    except ValueError:
        return None
    # The checksum is the sum of all bytes, its own field counted as eight spaces. Half of Adler-32 is 1 plus the sum
    # modulo 65,521, which 256 bytes do not reach.
    parts = (zlib.adler32(block[:256]), zlib.adler32(block[256:]), zlib.adler32(block[148:156]))
    total = (parts[0] & 0xFFFF) + (parts[1] & 0xFFFF) - (parts[2] & 0xFFFF) - 1 + 8 * 32
    return (name, length) if total == checksum and length >= 0 else None


def _pax_records(content: bytes, begin_of_first: int, header: int) -> dict[str, str]:
    """Records of the form `LENGTH KEY=VALUE newline` (POSIX.1-2001, pax interchange format).

    Args:
        content: of an extended header.
        begin_of_first, header: byte at which the first one of its member begins, and byte at which it begins itself.
    """
    records = {}
    begin = 0
    while begin < len(content):
        try:
            space = content.index(b" ", begin, begin + 20)
            end = begin + int(content[begin:space])
            key, equals, value = content[space + 1 : end - 1].partition(b"=")
            if end < space + 2 or not equals:
                raise ValueError
        except ValueError:
            raise DamagedTar(f"bad pax header at byte {header}", begin_of_first, resume=header + 1) from None
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        begin = end
    return records
