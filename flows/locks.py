"""Locks that end with the processes that hold them, whatever way those end; so each run's own lock says if it is alive.

A lock is a file under `flock(2)`: the kernel frees it when the last process that has it open is gone, so nothing ever
has to be cleaned up. It can be handed to a child (`pass_fds`), and then stays taken until the child has ended too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from io import FileIO
from pathlib import Path

from mode.paths import Paths
from mode.processes import die_with_parent

#: An open file that holds an exclusive lock. Closing it lets go, unless a child that was handed the file has it open.
Lock = FileIO
_alive: list[Lock | None] = []


def take(path: Path, holder: str) -> Lock | None:
    """Take a lock at once, or return `None`: another holds it. The file's text becomes `holder`.

    Example:
        >>> lock = take(Path(".mode/flow.lock"), "pipeline, run 12")
        >>> take(Path(".mode/flow.lock"), "pipeline, run 13") is None
        True
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    lock.truncate(0)
    lock.write(holder.encode())
    return lock


def holder(path: Path) -> str:
    """Who holds (or last held) a lock, for a message."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8") or "unknown"
    return "unknown"


def is_held(path: Path) -> bool:
    """Whether some process holds the lock now."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def mark_alive(root: Path) -> None:
    """Hold this run's own lock to the end of its process, and end with the worker; nothing without a worker.

    Not to the end of the flow: its final state is sent after that.
    """
    if run := os.environ.get("PREFECT__FLOW_RUN_ID"):
        die_with_parent()
        _alive.append(take(Paths(root).live_runs / run, str(os.getpid())))


def all_dead(root: Path) -> bool:
    """Whether no run that was started on this machine has a process."""
    return not any(map(is_held, Paths(root).live_runs.glob("*")))


def dead_runs(root: Path) -> list[str]:
    """Ids of runs that were started on this machine and whose process has gone."""
    return sorted(path.name for path in Paths(root).live_runs.glob("*") if not is_held(path))


def forget_run(root: Path, run: str) -> None:
    """Drop a run's mark, once its final state is known."""
    (Paths(root).live_runs / run).unlink(missing_ok=True)
