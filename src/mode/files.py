"""Files that are either whole or not there, and their checksums."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Write a file or folder beside `path` and move it into place only when the block ends without an error.

    What was at `path` before stays untouched until then, and is replaced as a whole. The temporary path has the name of
    `path` (inside a hidden folder next to it), because some writers look at the suffix. What a killed process has left
    behind is removed by the next write to the same path.

    Args:
        path: where the file or folder shall be; missing parents are made.

    Yields:
        The path to write to: nothing is there yet.

    Raises:
        FileNotFoundError: the block wrote nothing.

    Example:
        >>> with write_aside(Path("numbers.txt")) as temporary:
        ...     _ = temporary.write_text("1 2 3")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    # The lock ends with the process, however that ends, and so tells a leftover from work in progress.
    lock = os.open(aside, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        temporary = aside / path.name
        yield temporary
        _flush(temporary)
        if path.is_dir() and not path.is_symlink():
            # A folder cannot be renamed onto one that is not empty: the old one steps aside first.
            path.replace(aside / f"{path.name}.previous")
        temporary.replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)


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


def _flush(path: Path) -> None:
    """Bring content to the disk: in a power cut the rename may otherwise outlive it."""
    for each in path.rglob("*") if path.is_dir() else [path]:
        if each.is_file():
            with each.open("rb") as file:
                os.fsync(file.fileno())


def _remove_leftovers(path: Path) -> None:
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp/"):
        with suppress(OSError):  # held by a living process, or removed by another one just now
            lock = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)
