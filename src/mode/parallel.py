"""The same function over many items, many at a time, results in order."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from mode.errors import ModeError

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Results that may wait for the consumer, per worker: enough to keep workers busy, few enough for the memory.
_AHEAD = 2


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Threads:
    """Threads for work that may take for ever, such as waiting for an answer: no process that ends waits for them.

    Those of `concurrent.futures` are waited for when Python ends, whatever they do.

    Args:
        count: of threads, which are started with the first work.
        name: for debuggers.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Have it done by the next thread that is free."""
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._work, daemon=True, name=self._name) for _ in range(self._count)
            ]
            for thread in self._threads:
                thread.start()
        future: Future[Result] = Future()
        self._queue.put((future, work))
        return future

    def close(self, seconds: float = 0.0) -> None:
        """Give up what has not begun; each thread ends after what it is at, for which it is given so long."""
        with suppress(Empty):
            while given := self._queue.get_nowait():
                given[0].cancel()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(seconds)
        self._threads = []

    def _work(self) -> None:
        while given := self._queue.get():
            future, work = given
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # whoever waits for the result meets it
                future.set_exception(error)
            del given, future, work  # a thread that waits holds nothing


def in_order(
    submit: Callable[[Item], Future[Result]],
    items: Iterable[Item],
    ahead: int,
    result: Callable[[Future[Result]], Result] = Future.result,
) -> Iterator[Result]:
    """Results in the order of the items, `ahead` of which are submitted beyond the one that is waited for.

    Args:
        submit: starts the work on an item, in a pool.
        items: taken a few at a time as results are consumed.
        result: waits for what is under way.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(submit(item))
            if len(waiting) > ahead:
                yield result(waiting.popleft())
        while waiting:
            yield result(waiting.popleft())
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
