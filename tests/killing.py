"""Work that is killed at a chosen instant: at its n-th step that changes what lies on the disk, or its n-th call."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

#: Functions of the system that change what lies on the disk, or bring it there.
_STEPS = frozenset({"fsync", "link", "mkdir", "open", "posix_fallocate", "rename", "replace", "rmdir", "symlink",
                    "truncate", "unlink"})  # fmt: skip
#: Methods of open files that do, and functions of libraries.
_WRITES, _LIBRARY = frozenset({"write", "truncate", "flush"}), frozenset({"serialize_file"})

#: What Python tells its auditors of all of these, at no cost.
_AUDITED = frozenset({"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
                      "shutil.rmtree", "tempfile.mkdtemp"})  # fmt: skip

#: What an instant is: the opening, moving or removing of a file, or its flush to the disk; or, much slower to count, a
#: step as `is_step` says, which are these and every write; or the call of any function.
Clock = Literal["files", "steps", "calls"]
SERVER = multiprocessing.get_context("forkserver")


def is_step(event: str, frame: FrameType, argument: Any) -> bool:
    """Whether an event of `sys.setprofile` is the beginning of a step that changes what lies on the disk."""
    if event == "call":
        return frame.f_code.co_name == "_exchange"
    if event != "c_call":
        return False
    name, owner = argument.__name__, getattr(argument, "__self__", None)
    if getattr(owner, "__name__", None) == "posix":
        return name in _STEPS
    on_disk = isinstance(owner, io.IOBase) and not isinstance(owner, io.StringIO | io.BytesIO)
    return (name in _WRITES and on_disk) or name in _LIBRARY


def forked(work: Callable[[], object]) -> int:
    """Do something in a fork of this process; its exit code, negative after a signal."""
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    try:
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def served(work: Callable[[], object]) -> int:
    """The same in a fork of a process that does nothing but wait: safe whatever threads this one has.

    What that process has imported (`SERVER.set_forkserver_preload`) the fork has too. `work` has to be picklable.
    """
    process = SERVER.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def end_at(
    instant: int,
    clock: Clock,
    number: int,
    work: Callable[[], object],
    run: Callable[[Callable[[], object]], int] = forked,
) -> int:
    """Do something in a process of its own that sends itself a signal at an instant.

    Args:
        instant: from 1; beyond the end, nothing happens.
        clock: what it counts.
        number: of the signal, such as SIGKILL.
        work: what to do.
        run: in which process: `forked` or `served`.

    Returns:
        The exit code of the process, negative after a signal; 0: the work was done.
    """
    return run(partial(_end_at, instant, clock, number, work))


def instants(clock: Clock, work: Callable[[], object], note: Path) -> int:
    """How many instants there are in something that is done in a process of its own, `served`.

    `note` is a file that the process may write the number to.
    """
    assert served(partial(_count, clock, work, note)) == 0
    return int(note.read_text())


def _end_at(instant: int, clock: Clock, number: int, work: Callable[[], object]) -> None:
    _Clock(clock, lambda count: count == instant and os.kill(os.getpid(), number)).start()
    work()


def _count(clock: Clock, work: Callable[[], object], note: Path) -> None:
    counted = _Clock(clock)
    counted.start()
    work()
    number = counted.count
    note.write_text(str(number))


class _Clock:
    """Counts instants of this process from now on, in all of its threads; tells `at` each number."""

    def __init__(self, clock: Clock, at: Callable[[int], object] = abs) -> None:
        self.count, self._clock, self._at = 0, clock, at

    def start(self) -> None:
        if self._clock == "files":
            flush = os.fsync
            os.fsync = lambda descriptor: (self._tick(), flush(descriptor))[1]  # type: ignore[assignment]
            sys.addaudithook(lambda event, _: self._tick() if event in _AUDITED else None)
        else:
            threading.setprofile(self._look)
            sys.setprofile(self._look)

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if is_step(event, frame, argument) if self._clock == "steps" else event in ("call", "c_call"):
            self._tick()

    def _tick(self) -> None:
        self.count += 1
        self._at(self.count)


KILL, TERM = signal.SIGKILL, signal.SIGTERM
