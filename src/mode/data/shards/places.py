"""Where bytes come from: files of this machine, or objects that fsspec reaches (`https://`, `s3://`, `gs://` ...).

A path is a URL if it has `://`; any other is relative to the project folder, or absolute. Local files are read with
`pread`. Objects are read by ranges; an answer that fails is asked for again before it becomes an error.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import math
import os
import re
import stat
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from mode.errors import ModeError

Result = TypeVar("Result")

#: Seconds before a failed request is made again: five requests in all.
PAUSES = (0.5, 1.0, 2.0, 4.0)
#: Bytes that a scan asks for at once: more than the headers and texts between two images, less than waiting for another
#: answer costs. Images that are larger are passed over.
AHEAD = 512 * 2**10
#: Objects that a server is asked about at once.
_REQUESTS = 16
_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
#: Objects that ranges may name: more are asked about one by one for days, and are a slip of the key.
_MOST_NAMED = 1_000_000


class ByteFile(Protocol):
    """Bytes of a file or object."""

    size: int

    def read(self, length: int, offset: int) -> bytes:
        """As `os.pread`: `length` bytes from `offset`, fewer at the end of the file.

        Raises:
            OSError: the file is gone.
            ModeError: a server does not answer, or answers with an error, again and again.
        """

    def close(self) -> None:
        """No more reading."""


class LocalFile:
    """A file, by its descriptor; closed at the latest when nobody holds it any more.

    Attributes:
        size: in bytes.
        state: what tells the file as it was opened from another one, or from itself after it was written to.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
        self._closing = weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise OSError(errno.EINVAL, "not a file", str(path))
        self.size, self.state = status.st_size, _state_of(status)

    def has_changed(self) -> bool:
        """Whether it was written to since it was opened, or since this was asked last; `size` and `state` follow."""
        status, before = os.fstat(self._descriptor), self.state
        self.size, self.state = status.st_size, _state_of(status)
        return self.state != before

    def fileno(self) -> int:
        """The descriptor, which is open as long as this is."""
        return self._descriptor

    def read(self, length: int, offset: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def close(self) -> None:
        self._closing()


class RemoteFile:
    """An object, by its URL.

    Args:
        url: any that fsspec knows.
        size: in bytes; default: the server is asked.
        ahead: bytes to ask for at least, which following reads are served from; 0 asks for what is wanted.
    """

    def __init__(self, url: str, size: int | None = None, ahead: int = 0) -> None:
        self.url, self._ahead = url, ahead
        self.size = describe(url, Path()).size if size is None else size
        self._held, self._from = b"", 0

    def read(self, length: int, offset: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        if not self._from <= offset <= offset + length <= self._from + len(self._held):
            end = min(offset + max(length, self._ahead), self.size)
            content = patiently(self.url, lambda: self._ask(offset, end)) if end > offset else b""
            if not self._ahead:
                return content
            self._held, self._from = content, offset
        return self._held[offset - self._from :][:length]

    def _ask(self, start: int, end: int) -> bytes:
        filesystem, path = filesystem_of(self.url)
        content: bytes = filesystem.cat_file(path, start=start, end=end)
        if len(content) != end - start:
            raise OSError(f"{len(content)} bytes instead of {end - start}: no ranges, or another object than before")
        return content

    def close(self) -> None:
        self._held = b""


class Description(NamedTuple):
    """What identifies the content of a file without reading it.

    Attributes:
        size: in bytes.
        mtime_ns: time of the last change in nanoseconds since 1970, 0 where a server does not say.
        etag: a server's name for the content.
    """

    size: int
    mtime_ns: int
    etag: str | None


def is_url(path: str) -> bool:
    """Whether this is no path of this machine."""
    return "://" in path


def open_bytes(path: str, root: Path, ahead: int = 0, size: int | None = None) -> LocalFile | RemoteFile:
    """Open a file of a source; `ahead` and `size` are of an object, see `RemoteFile`."""
    return RemoteFile(path, size, ahead) if is_url(path) else LocalFile(root / path)


def describe(path: str, root: Path) -> Description:
    """Size and identity.

    Raises:
        OSError: there is no such file.
        ModeError: the server does not say, or does not answer.
    """
    if not is_url(path):
        status = (root / path).stat()
        return Description(status.st_size, status.st_mtime_ns, None)
    filesystem, inside = filesystem_of(path)
    info: dict[str, Any] = patiently(path, lambda: filesystem.info(inside))
    if info.get("size") is None:
        raise ModeError(f"{path}: the server does not say how long it is", "shards have to be plain objects")
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    names = ("LastModified", "Last-Modified", "mtime", "updated", "created")
    changed = next(filter(None, map(info.get, names)), None)
    return Description(int(info["size"]), _nanoseconds(changed), str(etag) if etag else None)


def describe_all(paths: Sequence[str], root: Path) -> list[Description]:
    """`describe` of each; servers are asked about several at once."""
    if not any(map(is_url, paths)):
        return [describe(path, root) for path in paths]
    with ThreadPoolExecutor(_REQUESTS) as threads:
        return list(threads.map(lambda path: describe(path, root), paths))


def are_there(paths: Sequence[str], root: Path) -> list[bool]:
    """Whether each is a file or an object; servers are asked about several at once."""

    def is_there(path: str) -> bool:
        if not is_url(path):
            return (root / path).is_file()
        try:
            describe(path, root)
        except FileNotFoundError:
            return False
        return True

    if not any(map(is_url, paths)):
        return [is_there(path) for path in paths]
    with ThreadPoolExecutor(_REQUESTS) as threads:
        return list(threads.map(is_there, paths))


def digest_of(path: str, root: Path) -> str:
    """SHA-256 of the content, 64 hexadecimal digits; reads all of it."""
    at_once, digest = 8 * 2**20, hashlib.sha256()
    with closing(open_bytes(path, root, at_once)) as file:
        for offset in range(0, file.size, at_once):
            digest.update(file.read(at_once, offset))
    return digest.hexdigest()


def listed_urls(url: str) -> list[str]:
    """The tars that a URL means: one, a range `{000..999}`, a glob, or all below a prefix.

    Raises:
        ModeError: none, or the server cannot list; ranges that name none or more than a million.
    """
    if found := _RANGE.search(url):
        named = math.prod(max(int(last) - int(first) + 1, 0) for first, last in _RANGE.findall(url))
        if not 0 < named <= _MOST_NAMED:
            raise ModeError(f"{url}: names {named:,} objects", f"a range may name 1 to {_MOST_NAMED:,}")
        first, last = found.groups()
        numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        return [each for number in numbers for each in listed_urls(url[: found.start()] + number + url[found.end() :])]
    if url.endswith(".tar") and not glob.has_magic(url):
        return [url]
    filesystem, path = filesystem_of(url)
    pattern = path if glob.has_magic(path) else f"{path.rstrip('/')}/**/*.tar"
    names: list[str] = []
    with suppress(FileNotFoundError):
        names = patiently(url, lambda: filesystem.glob(pattern))
    tars = sorted({filesystem.unstrip_protocol(name) for name in names if str(name).endswith(".tar")})
    if not tars:
        raise ModeError(
            f"{url}: no .tar found there", "a web server cannot list: name {000..999}.tar, or a .txt of URLs"
        )
    return tars


def filesystem_of(url: str) -> tuple[Any, str]:
    """File system and path of a URL, anew in each process: none can be taken along in a fork.

    Raises:
        ModeError: fsspec does not know it, or lacks what it needs for it.
    """
    return _filesystem(url, os.getpid())


@cache
def _filesystem(url: str, _process: int) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ModeError(f"{url}: {' '.join(str(error).split())}", "install what fsspec needs for it") from None
    return filesystem, path


def patiently(url: str, request: Callable[[], Result]) -> Result:
    """The answer to a request, which is made again if it fails in a way that may pass.

    Raises:
        FileNotFoundError: there is nothing at the URL.
        ModeError: it failed again and again.
    """
    for pause in (*PAUSES, None):
        try:
            return request()
        except ModeError:
            raise
        except Exception as raised:  # whatever the file system's own library calls it
            # fsspec's http says "not found" of every question for a size that failed, whatever the server's answer.
            status = 404 if raised.__cause__ is None else getattr(raised.__cause__, "status", None)
            if isinstance(raised, FileNotFoundError) and status in (404, 410):
                raise FileNotFoundError(errno.ENOENT, "not there", url) from None
            if pause is None:
                error = raised.__cause__ or raised
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ModeError(f"{url}: {reason[:200]}", f"asked {len(PAUSES) + 1} times; try again later") from None
            time.sleep(pause)
    raise AssertionError


def _state_of(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _nanoseconds(changed: object) -> int:
    """Since 1970, of what a server says; 0 if it is no time."""
    if isinstance(changed, str):
        for parse in (parsedate_to_datetime, datetime.fromisoformat):
            with suppress(ValueError):
                return _nanoseconds(parse(changed))
    if isinstance(changed, datetime):
        return int((changed if changed.tzinfo else changed.replace(tzinfo=UTC)).timestamp()) * 10**9
    return int(float(changed) * 1e9) if isinstance(changed, (int, float)) else 0
