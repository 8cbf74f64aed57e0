"""Files that are either whole or not there, and their checksums."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mode.errors import ModeError

#: What a rename says where only an exchange can put one thing in the place of another.
_OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR)
#: What a system or file system says that cannot exchange.
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV)
#: Of renameat2(2): paths start at the working directory; exchange the two.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
#: What a system says where there is no room for a file, and what libraries make of it that keep no number: numpy,
#: safetensors and SQLite.
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_NO_ROOM_SAID = re.compile(
    r"No space left on device|File too large|quota exceeded|requested and \d+ written|disk is full"
)


class NoRoom(ModeError):
    """A disk is full; `reason` says so without the file."""

    def __init__(self, path: Path, error: BaseException, written: int) -> None:
        known = error.strerror if isinstance(error, OSError) and error.errno in _NO_ROOM else None
        free = shutil.disk_usage(path.parent).free
        self.reason = (
            f"{known or os.strerror(errno.ENOSPC)}: {written:,} bytes of it were written, {free:,} more are free"
        )
        super().__init__(f"{path}: cannot be written: {self.reason}", "make room and run it again")


@contextmanager
def told_of_no_room(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Make an error in the block that says in any library's words that the disk is full one that names the file.

    Args:
        path: the file or folder that the block writes.
        temporary: where it writes it, if that is elsewhere.

    Raises:
        NoRoom: there is no room.
    """
    try:
        yield
    except ModeError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) not in _NO_ROOM and not _NO_ROOM_SAID.search(str(error)):
            raise
        raise NoRoom(path, error, _size_of(temporary or path)) from None


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Write a file or folder beside `path` and move it into place only when the block ends without an error.

    What was at `path` before stays untouched until then, and is replaced as a whole and at once: whoever looks, and
    whenever the process is killed or the power fails, `path` is the old one or the new one. (Where the file system
    cannot exchange two folders there is a moment without either; `recover` mends it if the writer is killed just then.)
    A symbolic link at `path` is replaced itself; what it points to is left alone. The temporary path has the name of
    `path` (inside a hidden folder next to it), because some writers look at the suffix. What a killed process has left
    behind is removed by the next write to the same path. Files get the permissions that the umask gives, whatever wrote
    them.

    Args:
        path: where the file or folder shall be; missing parents are made.

    Yields:
        The path to write to: nothing is there yet.

    Raises:
        FileNotFoundError: the block wrote nothing.
        NoRoom: the disk is full.

    Example:
        >>> with write_aside(Path("numbers.txt")) as temporary:
        ...     _ = temporary.write_text("1 2 3")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    aside, lock = _new_folder_beside(path)
    try:
        temporary = aside / path.name
        with told_of_no_room(path, temporary):
            yield temporary
            _give_usual_permissions(temporary)
            _flush(temporary)
        _move_into_place(temporary, path)
        _flush_folder(path.parent)
    finally:
        try:
            _put_back(aside, path)
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            os.close(lock)


def recover(path: Path) -> None:
    """Clear up after writers of `path` that were killed, and put back what one had moved away and not yet replaced.

    Whatever opens a file or folder and finds nothing there calls this and looks again; it costs a look at the parent
    folder. What living writers are at work on is left alone.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp/"):
        with suppress(OSError):  # held by a living process, or removed by another one just now
            lock = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _put_back(leftover, path)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)


def is_there(path: Path) -> bool:
    """Whether there is a file or folder, after `recover` where there seems to be none."""
    if not path.exists():
        recover(path)
    return path.exists()


def finish(partial: Path, path: Path) -> None:
    """Move a file that was long in the making, and is complete now, to its place; all of it is on the disk then."""
    _flush(partial)
    partial.replace(path)
    _flush_folder(path.parent)


@contextmanager
def only_writer(path: Path, what: str) -> Iterator[None]:
    """Hold a file's lock (flock) while the block runs; it ends with the process, however that ends.

    Args:
        path: the lock's file, made if it is not there and left there; its text says who holds it.
        what: is being written, for the message to others.

    Raises:
        ModeError: another process holds it; names that process. Where the file system has no locks, nobody is refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            raise ModeError(f"{what} is being written by {holder}", "wait until that has ended, or stop it") from None
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
        file.flush()
        yield


def make_room(path: Path, size: int) -> None:
    """Give a file, which is made if it is not there, all the room on the disk that it will take; new room is zeros.

    So a disk that is too small says so before hours of work, and not after; and a file that is written through memory
    does not end the process with SIGBUS.

    Args:
        path: the file; its folder is there.
        size: in bytes.

    Raises:
        ModeError: there is not so much room, or a file may not be so large. One that was not there is not made then.
    """
    is_new = not path.exists()
    with path.open("ab") as file:
        try:
            _allocate(file.fileno(), size)
        except OSError as error:
            if is_new:
                path.unlink()
            if error.errno not in _NO_ROOM:
                raise
            free = shutil.disk_usage(path.parent).free
            raise ModeError(
                f"{path}: {error.strerror}: {size:,} bytes are needed, {free:,} are free", "make room and run it again"
            ) from None


def add_to_tar(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file with time 0 and no owner: the same contents give the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """SHA-256 of the names and contents of all files in a folder and below it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _new_folder_beside(path: Path) -> tuple[Path, int]:
    """A hidden folder next to `path` and the lock on it, which tells a leftover from work in progress.

    The lock ends with the process, however that ends. Another process may take the new folder for a leftover before it
    is locked: then there is no such folder any more, and one more is made.
    """
    while True:
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        with suppress(FileNotFoundError):
            lock = os.open(aside, os.O_RDONLY)
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if aside.is_dir():
                return aside, lock
            os.close(lock)


def _give_usual_permissions(path: Path) -> None:
    """Give a file, or every file in a folder, what the umask gives a new one: safetensors lets only the owner read."""
    sample = path.parent / f"{path.name}.permissions"
    sample.touch()
    usual = sample.stat().st_mode & 0o777
    sample.unlink()
    for each in path.rglob("*") if path.is_dir() else (path,):
        if each.is_file() and not each.is_symlink() and usual & ~each.stat().st_mode:
            each.chmod(usual | each.stat().st_mode & 0o777)


def _move_into_place(temporary: Path, path: Path) -> None:
    """Put `temporary` where `path` is: by a rename if nothing or a file is there, else by an exchange."""
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
        if not _exchange(temporary, path):
            _flush_folder(temporary.parent)
            path.replace(_previous(temporary.parent, path))
            temporary.replace(path)


def _previous(aside: Path, path: Path) -> Path:
    """Where what was at `path` steps aside to, in a file system that cannot exchange."""
    return aside / f"{path.name}.previous"


def _put_back(aside: Path, path: Path) -> None:
    """If the old one has stepped aside and the new one has not taken its place: it does now, for it is whole."""
    temporary, previous = aside / path.name, _previous(aside, path)
    if os.path.lexists(previous) and os.path.lexists(temporary) and not os.path.lexists(path):
        try:
            temporary.replace(path)
        except OSError:
            previous.replace(path)
        _flush_folder(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Each becomes the other, at once (renameat2(2)); False where system or file system cannot do that."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _allocate(descriptor: int, size: int) -> None:
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    if os.fstat(descriptor).st_size < size:
        os.truncate(descriptor, size)


def _size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder and below it; 0 of nothing."""
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(each.stat().st_size for each in files if each.is_file())


def _flush(path: Path) -> None:
    """Bring a file, or all of a folder, to the disk: in a power cut the rename may otherwise outlive it."""
    for each in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if each.is_dir():
            _flush_folder(each)
        elif each.exists():
            with each.open("rb") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk, where the file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
