"""Where bytes come from: files of this machine, or objects that fsspec reaches (`https://`, `s3://`, `gs://` ...).

A path is a URL if it has `://`; any other is relative to the project folder, or absolute. Local files are read with
`pread`. Objects are read by ranges; an answer that fails is asked for again before it becomes an error.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import math
import os
import re
import stat
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from mode.errors import ModeError, in_one_line

Result = TypeVar("Result")

log = logging.getLogger(__name__)

#: Seconds before a failed request is made again: nine requests in all, over a minute and a half.
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0)
#: An answer that is not the range that was asked for is one of a server that cannot do better: so many requests more.
_FEW = 4
#: A wait that is told in the log, in seconds.
_LONG = 8.0
#: Bytes that a scan asks for at once: more than the headers and texts between two images, less than waiting for another
#: answer costs. Images that are larger are passed over.
AHEAD = 512 * 2**10
#: Objects that a server is asked about at once.
_REQUESTS = 16
#: Of URLs whose answers have headers to be seen.
_WEB, _S3 = ("http://", "https://"), ("s3://", "s3a://")
#: Headers that tell the version of an object; the first of them that there is counts.
_VERSIONS = ("ETag", "Last-Modified")
_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")
#: Objects that ranges may name: more are asked about one by one for days, and are a slip of the key.
_MOST_NAMED = 1_000_000


#: What stores that speak S3 call credentials that were right once, and what will not be right by itself.
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired")
_DENIED = (
    "AccessDenied",
    "AccountProblem",
    "AllAccessDisabled",
    "InvalidAccessKeyId",
    "InvalidToken",
    "NoCredentialsError",
    "NotSignedUp",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "401",
    "403",
)
_NO_BUCKET, _NO_RANGE = "NoSuchBucket", ("InvalidRange", "416")
#: Answers to a question without a body, which do not say why.
_WITHOUT_REASON = ("400", "403")


class WrongRange(ModeError):
    """An object has not the bytes that were asked for, again and again: it may be another one than it was."""


class _WrongAnswer(OSError):
    """Other bytes than were asked for, or of another object."""


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
        etag: that it has to have; default: any. A web server and S3 say with each answer of which version it is: all
            have to be of one, by ETag or, without any, by the time of its last change.
    """

    def __init__(self, url: str, size: int | None = None, ahead: int = 0, etag: str | None = None) -> None:
        self.url, self._ahead = url, ahead
        self._version = {} if etag is None else {_VERSIONS[0]: etag}
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
        content = _range_of(self.url, start, end, self._compare)
        if len(content) != end - start:
            found = f"{len(content)} bytes" if len(content) < end - start else "more bytes"
            raise _WrongAnswer(f"{found} instead of {end - start}: no ranges, or another object than before")
        return content

    def _compare(self, headers: Mapping[str, str]) -> None:
        """Refuse an answer whose headers name another version; one without any is taken as it is."""
        for name in _VERSIONS:
            if found := _writable(headers.get(name.lower(), "")):  # as botocore writes them; aiohttp ignores case
                if (before := self._version.setdefault(name, found)) != found:
                    raise _WrongAnswer(f"another object than before: its {name} is {found}, it was {before}")
                return

    def close(self) -> None:
        self._held = b""


def _range_of(url: str, start: int, end: int, compare: Callable[[Mapping[str, str]], None]) -> bytes:
    """Bytes of an object by one request; of a web server and of S3, `compare` sees the answer's headers before them.

    A server may send more than was asked for, all of a tar or without an end: one byte more is taken, which tells that
    there is more, and then no other. Of another store the library that fsspec has for it takes the answer.
    """
    from fsspec import AbstractFileSystem
    from fsspec.asyn import sync

    filesystem, path = filesystem_of(url)
    if url.startswith((*_S3, *_WEB)):
        ask = _ask_s3 if url.startswith(_S3) else _ask_web
        content: bytes = sync(filesystem.loop, ask, filesystem, path, start, end, compare)
        return content

    # Where a range is read from an opened file, that would ask for five megabytes more, in case one goes on.
    is_opened = type(filesystem).cat_file is AbstractFileSystem.cat_file
    content = filesystem.cat_file(path, start=start, end=end, **({"cache_type": "none"} if is_opened else {}))
    return content


def read_start(url: str, most: int) -> bytes:
    """The first bytes of an object, `most` at most; raises as `patiently`."""
    try:
        return patiently(url, lambda: _range_of(url, 0, most, lambda _: None))[:most]
    except WrongRange:  # it is empty
        return b""


async def _ask_s3(
    filesystem: Any, path: str, start: int, end: int, compare: Callable[[Mapping[str, str]], None]
) -> bytes:
    """What s3fs's `cat_file` does, which hands on no headers."""
    bucket, key, _ = filesystem.split_path(path)
    answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
    try:
        compare(answer["ResponseMetadata"]["HTTPHeaders"])
        return await _read(answer["Body"], end - start + 1)
    finally:
        answer["Body"].close()


async def _ask_web(
    filesystem: Any, url: str, start: int, end: int, compare: Callable[[Mapping[str, str]], None]
) -> bytes:
    """What fsspec's `cat_file` does, which reads all that a server sends, of an error too."""
    settings = dict(filesystem.kwargs)
    # Bytes as they are: of a compressed answer nobody knows how long it is.
    headers = {**settings.pop("headers", {}), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    session = await filesystem.set_session()
    async with session.get(filesystem.encode_url(url), headers=headers, **settings) as answer:
        if answer.status == 404:
            raise FileNotFoundError(url)
        answer.raise_for_status()
        compare(answer.headers)
        return await _read(answer.content, end - start + 1)


async def _read(body: Any, most: int) -> bytes:
    """So many bytes of an answer, or as many as there are."""
    parts: list[bytes] = []
    while most > 0 and (part := await body.read(most)):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


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
    info: dict[str, Any] = patiently(path, lambda: _info(path, filesystem, inside))
    if info.get("size") is None:
        raise ModeError(f"{path}: the server does not say how long it is", "shards have to be plain objects")
    etag = info.get("ETag") or info.get("etag") or info.get("md5Hash")
    names = ("LastModified", "Last-Modified", "mtime", "updated", "created")
    changed = next(filter(None, map(info.get, names)), None)
    return Description(int(info["size"]), _nanoseconds(changed), _writable(str(etag)) if etag else None)


def _info(url: str, filesystem: Any, path: str) -> dict[str, Any]:
    """What a file system says of an object; where it must not, the error says why."""
    try:
        info: dict[str, Any] = filesystem.info(path)
    except OSError as error:
        if _code_of(error) in _WITHOUT_REASON:
            _range_of(url, 0, 1, lambda _: None)
        raise
    return info


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
        # What a store says of an object is asked anew each time: it may have changed since.
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ModeError(f"{url}: {in_one_line(error)}", "install what fsspec needs for it") from None
    return filesystem, path


def patiently(url: str, request: Callable[[], Result]) -> Result:
    """The answer to a request, which is made again if it fails in a way that may pass.

    Credentials that have expired may be renewed meanwhile: they are looked for anew before each request.

    Raises:
        FileNotFoundError: there is nothing at the URL.
        WrongRange: its object has not the bytes that were asked for.
        ModeError: it failed again and again, or in a way that does not pass: wrong credentials, no such bucket.
    """
    for number, pause in enumerate((*PAUSES, None)):
        asked = time.monotonic()
        try:
            return request()
        except ModeError:
            raise
        except Exception as raised:  # whatever the file system's own library calls it
            code, reason = _code_of(raised), _reason_of(raised)
            if code == _NO_BUCKET:
                raise ModeError(f"{url}: no such bucket", "see its name, and whose credentials are used") from None
            if isinstance(raised, FileNotFoundError) and code in ("", "404", "410", "NoSuchKey"):
                raise FileNotFoundError(errno.ENOENT, "not there", url) from None
            if code in _DENIED:
                raise ModeError(f"{url}: refused: {reason}", f"see {_credentials_of(url)}") from None
            is_wrong = isinstance(raised, _WrongAnswer)
            if code in _NO_RANGE or (is_wrong and (number == _FEW or pause is None)):
                raise WrongRange(f"{url}: {reason}", f"asked {number + 1} times; try again later") from None
            if pause is None and code in _EXPIRED:
                what = f"{url}: {_credentials_of(url)} have expired"
                raise ModeError(what, "renew them and run it again; a training goes on from its checkpoint") from None
            if pause is None:
                raise ModeError(f"{url}: {reason}", f"asked {number + 1} times; try again later") from None
            if pause >= _LONG:
                log.warning("%s: %s; asked again in %.0f s", url, reason, pause)
            wait(pause)
            if code in _EXPIRED:
                _renew(url, asked)
    raise AssertionError


def wait(seconds: float) -> None:
    """Do nothing for so long."""
    time.sleep(seconds)


def _code_of(error: BaseException) -> str:
    """What a store calls an error: a word of S3, or the number of an answer by HTTP; "" if neither is known."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        if type(each).__name__ in _DENIED:
            return type(each).__name__
        if isinstance(status := getattr(each, "status", None), int):
            return str(status)
    # fsspec's http says "not found" of every question for a size that failed, whatever the server's answer.
    return "unknown" if isinstance(error.__cause__, OSError) else ""


def _reason_of(error: BaseException) -> str:
    """On one line, for people."""
    told = error.__cause__ or error
    return (" ".join(str(told).split()) or type(told).__name__)[:200]


def _credentials_of(url: str) -> str:
    """Where the credentials for a URL were found, for people: never they themselves."""
    if not url.startswith(_S3):
        return f"the credentials for {url.partition('://')[0]}://"
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return "the credentials in the environment (AWS_ACCESS_KEY_ID ...)"
    file = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    return f"the credentials of profile '{os.environ.get('AWS_PROFILE', 'default')}' in {file}"


_renewing = threading.Lock()
_renewed: dict[int, float] = {}


def _renew(url: str, asked: float) -> None:
    """Have a file system look for its credentials anew, unless that was done since a time."""
    with _renewing:
        if _renewed.get(os.getpid(), 0.0) > asked:
            return
        filesystem, _ = filesystem_of(url)
        if hasattr(filesystem, "connect"):  # s3fs
            filesystem.connect(refresh=True)
        else:
            filesystem.clear_instance_cache()
            _filesystem.cache_clear()
        _renewed[os.getpid()] = time.monotonic()


def _state_of(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _writable(header: str) -> str:
    """What a server says, as it can stand in a file: bytes that are not UTF-8 as escapes."""
    return header.encode("utf-8", "backslashreplace").decode()


def _nanoseconds(changed: object) -> int:
    """Since 1970, of what a server says; 0 if it is no time."""
    if isinstance(changed, str):
        for parse in (parsedate_to_datetime, datetime.fromisoformat):
            with suppress(ValueError, OverflowError):
                return _nanoseconds(parse(changed))
        return 0
    with suppress(ValueError, OverflowError):
        if isinstance(changed, datetime):
            return int((changed if changed.tzinfo else changed.replace(tzinfo=UTC)).timestamp()) * 10**9
        if isinstance(changed, (int, float)):
            return int(float(changed) * 1e9)
    return 0
