"""The same function over many items, many at a time, results in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mode.errors import ModeError

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Results that may wait for the consumer, per worker: enough to keep workers busy, few enough for the memory.
_AHEAD = 2


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(submit: Callable[[Item], Future[Result]], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """Results in the order of the items, `ahead` of which are submitted beyond the one that is waited for.

    Args:
        submit: starts the work on an item, in a pool.
        items: taken a few at a time as results are consumed.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(submit(item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`map`, in `workers` processes if there are two or more; `function` has to be importable by name.

    Processes are spawned, not forked: a fork of a process in which torch or faiss run threads can hang.

    Raises:
        ModeError: one of the processes was killed.
    """
    if workers < 2:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from in_order(lambda item: pool.submit(function, item), items, _AHEAD * workers)
        except BrokenProcessPool:
            raise ModeError(
                f"one of {workers} processes that work side by side was killed, perhaps for want of memory",
                "run it again; with fewer cores (`taskset`) fewer are started",
            ) from None
