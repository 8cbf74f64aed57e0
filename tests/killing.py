"""Work that is killed at a chosen instant: at its n-th step that changes what lies on the disk, or its n-th call."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

#: Functions of the system that change what lies on the disk, or bring it there.
_STEPS = frozenset({"fsync", "link", "mkdir", "open", "posix_fallocate", "rename", "replace", "rmdir", "symlink",
                    "truncate", "unlink"})  # fmt: skip
#: Methods of open files that do, and functions of libraries.
_WRITES, _LIBRARY = frozenset({"write", "truncate", "flush"}), frozenset({"serialize_file"})

Clock = Literal["steps", "calls"]


def is_step(event: str, frame: FrameType, argument: Any) -> bool:
    """Whether an event of `sys.setprofile` is the beginning of a step that changes what lies on the disk."""
    if event == "call":
        return frame.f_code.co_name == "_exchange"
    if event != "c_call":
        return False
    name, owner = argument.__name__, getattr(argument, "__self__", None)
    if getattr(owner, "__name__", None) == "posix":
        return name in _STEPS
    return (name in _WRITES and isinstance(owner, io.IOBase)) or name in _LIBRARY


def end_at(instant: int, clock: Clock, number: int, work: Callable[[], object]) -> int:
    """Do something in a forked process that sends itself a signal at an instant.

    Args:
        instant: from 1; beyond the end, nothing happens.
        clock: what it counts: steps as `is_step` says, or calls of functions of any kind.
        number: of the signal, such as SIGKILL.
        work: what to do.

    Returns:
        The exit code of the process, negative after a signal; 0: the work was done.
    """
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    try:
        with _Clock(clock, lambda count: count == instant and os.kill(os.getpid(), number)):
            work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def instants(clock: Clock, work: Callable[[], object]) -> int:
    """How many instants there are in something that is done in a forked process."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as told:
            count = told.read()
        os.waitpid(child, 0)
        assert count, "the work failed"
        return int(count)
    try:
        with _Clock(clock) as counted:
            work()
        os.write(writing, str(counted.count).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


class _Clock:
    """Counts instants of this process, in all of its threads."""

    def __init__(self, clock: Clock, at: Callable[[int], object] = abs) -> None:
        self.count, self._every, self._at = 0, clock == "calls", at

    def __enter__(self) -> _Clock:
        threading.setprofile(self._look)
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if (event in ("call", "c_call") and self._every) or (not self._every and is_step(event, frame, argument)):
            self.count += 1
            self._at(self.count)


KILL, TERM = signal.SIGKILL, signal.SIGTERM
