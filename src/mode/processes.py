"""What a process asks of its system: to end with its parent, to adopt orphans, to note signals, to give huge pages.
And of its libraries: to let threads that wait sleep, and of Python, to collect rarely.

Other systems than Linux have no `prctl`; there an orphan runs to its end.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_parent() -> None:
    """Get SIGTERM when the parent ends, however it ends: a killed `dvc` must not leave its stage running."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


@contextmanager
def noting_signals() -> Iterator[list[int]]:
    """Take SIGTERM and SIGINT as a request to stop: notes them; a second Ctrl-C ends the process.

    A second SIGTERM changes nothing: those who stop a tree of processes send it to each, and again through each parent.
    Outside the main thread, where Python allows no handler, nothing is noted.
    """
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT) if in_main_thread}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
