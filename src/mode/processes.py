"""What a process asks of its system: to end with its parent, to adopt orphans, to note signals, to give huge pages.
And of its libraries: to let threads that wait sleep, and of Python, to collect rarely.

Other systems than Linux have no `prctl`; there an orphan runs to its end.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
#: What asks a process to stop.
_STOPPING = (signal.SIGTERM, signal.SIGINT)


def die_with_parent() -> None:
    """Get SIGTERM when the parent ends, however it ends: a killed `dvc` must not leave its stage running."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def leads() -> bool:
    """Whether this process reports and writes: of those that torchrun starts one does."""
    return os.environ.get("RANK", "0") == "0"


class Signals(list[int]):
    """Numbers of the signals that came, in order.

    Attributes:
        first: when the first of them came, in seconds of `time.monotonic`; infinite while there is none.
    """

    first = math.inf

    def note(self, number: int, _: FrameType | None = None) -> None:
        """One more."""
        self.first = min(self.first, time.monotonic())
        self.append(number)


@contextmanager
def noting_signals(noted: Signals | None = None) -> Iterator[Signals]:
    """Take SIGTERM and SIGINT as a request to stop: notes them; a second Ctrl-C ends the process.

    A second SIGTERM changes nothing: those who stop a tree of processes send it to each, and again through each parent.
    Outside the main thread, where Python allows no handler, nothing is noted.

    Args:
        noted: to be added to; default: a new one.
    """
    signals = Signals() if noted is None else noted

    def note(number: int, _: FrameType | None) -> None:
        signals.note(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with handling_signals(note):
        yield signals


@contextmanager
def ending_at_signals(said: str) -> Iterator[None]:
    """End the process as soon as SIGTERM or SIGINT comes, with 143 or 130, and a line on standard error before.

    It is for work that may be killed at any time. Nothing is cleaned up, as after SIGKILL: a way out through cleanups
    is held up by threads that wait for a server, and by other processes; and Python drops an exception that a handler
    raises at the wrong moment, of an import for instance. Without a handler the system would end the process as well,
    but without a word; the first process of a container it would not.

    A call of a library that does not come back to Python is not interrupted.

    Args:
        said: the line; empty: none.
    """

    def leave(number: int, _: FrameType | None) -> None:
        with suppress(RuntimeError, OSError):  # it may be in the middle of being written to
            sys.stdout.flush()
        with suppress(OSError):
            os.write(2, f"{said}\n".encode() if said else b"")
        os._exit(128 + number)

    with handling_signals(leave):
        yield


@contextmanager
def before_ending(last: Callable[[], None], seconds: float) -> Iterator[None]:
    """Within `ending_at_signals`: do something before the process ends, for so long. Elsewhere, nothing.

    A thread of its own does it, for the main thread may be anywhere and hold any lock. More signals change nothing.
    """
    outer: dict[int, Any] = {number: signal.getsignal(number) for number in _STOPPING}
    told = False

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if told:
            return
        told = True
        thread = threading.Thread(target=last, daemon=True)
        thread.start()
        thread.join(seconds)
        if callable(end := outer[number]):
            end(number, frame)

    with handling_signals(leave) if all(map(callable, outer.values())) else nullcontext():
        yield


@contextmanager
def handling_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have SIGTERM and SIGINT handled, in the main thread."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in _STOPPING if in_main_thread}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def use_huge_pages() -> None:
    """Have torch ask for huge pages for tensors of 2 MB and more, unless the environment decides otherwise.

    On a CPU activations are allocated anew in every step; in pages of 4 kB the faults take up to a tenth of the time of
    training and prediction (docs/performance.md). Has to come before torch's first large tensor. Where Linux is told
    never to give huge pages (`/sys/kernel/mm/transparent_hugepage/enabled`), it changes nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def spin_briefly() -> None:
    """Have threads of OpenMP that wait for each other sleep after a short while, unless the environment decides.

    By default they spin for many milliseconds. Where other programs use the same cores, each wait then takes as long as
    the system gives to one of these: on a busy machine small clusterings took three times the processor time, and three
    times as long (docs/performance.md). Has to come before the first library that uses OpenMP (GNU's) is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def collect_rarely() -> None:
    """Have Python look for unreachable cycles after 10,000 new objects in place of 700.

    Importing torch and open_clip makes 400,000 that stay; to look through them again and again is a tenth of that time
    (docs/performance.md).
    """
    gc.set_threshold(max(10_000, gc.get_threshold()[0]))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value)
