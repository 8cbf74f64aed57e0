"""What tells a file from another one in its place, at a price that every reading of an image can pay.

Times say little: a copy has another one, and a replacement may have the same. So bytes are compared. Of a tar, 16 parts
spread over it are (`sample_of`) when it is opened; of each image, the tar header before it, which has its name and
size, and, if the index has looked into images, its last bytes (`check_of`). These find another file, other images
and another order of them; bits that have flipped inside an image are not what they are for.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mode.data.shards.places import ByteFile, Description, WrongRange, describe
from mode.errors import ModeError

#: Bytes before a member's content in a tar.
HEADER = 512
#: Bytes at the end of an image: coded pixels in any format, where its first ones are the same for many images.
TAIL = 512
#: Parts of a shard that are compared when it is opened, and their size.
_SAMPLES, _SAMPLE = 16, 2048


def check_of(content: bytes | None, before: int = 0) -> int:
    """CRC-32 of the last bytes of an image or header, going on from `before`; `before` itself without any."""
    return before if content is None else zlib.crc32(content[-TAIL:], before)


def is_same(check: int, header: bytes, content: bytes) -> bool:
    """Whether an image and the header before it are those that the index knows by `check`, with or without a look."""
    before = check_of(header) if header else 0
    return check in (0, before, check_of(content, before))


@contextmanager
def unchanged(path: str, root: Path) -> Iterator[Description]:
    """See that a file or object is the same after the block as before it: what was read there is of one version.

    Times are compared for being equal, never for their order, so that no clock has to be right.

    Args:
        path: relative to `root` or absolute; or a URL.

    Yields:
        What it is before and after.

    Raises:
        ModeError: it has changed, or is gone.
    """
    before = describe(path, root)
    try:
        yield before
    except WrongRange:
        _compare(path, root, before)
        raise
    _compare(path, root, before)


def _compare(path: str, root: Path, before: Description) -> None:
    try:
        after = describe(path, root)
    except FileNotFoundError:
        raise changed(path, "it is gone") from None
    if after != before:
        raise changed(path, difference(before, after))


def difference(before: Description, after: Description) -> str:
    """What tells two states of a file apart, for a message."""
    if before.size != after.size:
        return f"{after.size:,} bytes, it had {before.size:,}"
    if before.etag != after.etag:
        return f"its ETag is {after.etag}, it was {before.etag}"
    return "as long as it was, but written to"


def changed(path: str, how: str) -> ModeError:
    """The error of a shard that changes while it is indexed."""
    return ModeError(f"{path}: changed while it was read: {how}", "run it again when nobody writes to it")


def sample_of(file: ByteFile) -> int:
    """CRC-32 of parts spread evenly over a file; of all of a small one."""
    last = max(file.size - _SAMPLE, 0)
    places = sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)})
    sample = 0
    for place in places:
        sample = zlib.crc32(file.read(_SAMPLE, place), sample)
    return sample
