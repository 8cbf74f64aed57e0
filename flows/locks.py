"""Locks that end with the processes that hold them, whatever way those end.

A lock is a file under `flock(2)`: the kernel frees it when the last process that has it open is gone, so nothing ever
has to be cleaned up. It can be handed to a child (`pass_fds`), and then stays taken until the child has ended too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Self


class Lock:
    """An exclusive lock on a file, held from creation until `close`. The file's text says who holds it.

    Example:
        >>> lock = Lock.take(Path(".mode/flow.lock"), "pipeline, run 12")
        >>> Lock.take(Path(".mode/flow.lock"), "pipeline, run 13") is None
        True
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor

    @classmethod
    def take(cls, path: Path, holder: str) -> Lock | None:
        """Take the lock at once, or return `None`: another holds it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
        return cls(path, descriptor)

    def close(self) -> None:
        """Let go. Closing rather than unlocking: a child that was handed the lock keeps it until its own end."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def holder(path: Path) -> str:
    """Who holds (or last held) a lock, for a message."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8") or "unknown"
    return "unknown"


def is_held(path: Path) -> bool:
    """Whether some process holds the lock now."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
