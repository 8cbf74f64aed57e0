"""Where a function goes through many blocks: in this process, or in many with Dask.

The blocks are the same either way, and results come back in their order. An engine changes how long a stage takes, not
what it writes.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mode.errors import ModeError, first_line

if TYPE_CHECKING:
    from distributed import Client, Future

Item = TypeVar("Item")
Result = TypeVar("Result")

LOCAL, DASK = "local", "dask"
#: Blocks in flight for each thread of a cluster: one in work, one on its way.
AHEAD = 2
#: Seconds in which a scheduler has to answer.
PATIENCE = 20


class Engine(Protocol):
    """`map`: results in the order of the items, which are taken only a few ahead of the results."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
        """Results of `function`, which must be one that can be pickled, and small."""


def in_this_process(function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
    """The engine `local`: one block after the other."""
    yield from map(function, items)


@contextmanager
def open_engine(setting: str, processes: int, gpus: int = 0) -> Iterator[Engine]:
    """An engine, for as long as the context lasts.

    Args:
        setting: `local`; `dask`, processes on this machine; or the address of a Dask scheduler, such as
            `tcp://host:8786`, whose workers (and itself) run in the same environment as this process and see the
            project folder under the same path.
        processes: of `dask`, each with one thread.
        gpus: of `dask`: if not 0, a process for each of these many GPUs instead, which sees no other.

    Raises:
        ModeError: the setting is none of these, or no scheduler answers. Inside the context: a block failed.

    Example:
        >>> with open_engine("local", processes=1) as engine:
        ...     list(engine(len, ["a", "bc"]))
        [1, 2]
    """
    if setting == LOCAL:
        yield in_this_process
        return
    if setting != DASK and "://" not in setting:
        raise ModeError(
            f"machine.engine: there is no engine '{setting}'",
            "local, dask, or the address of a Dask scheduler such as tcp://host:8786",
        )
    import dask
    import distributed  # noqa: F401 (has its settings in place before one is changed for a while: the end would take all)

    with ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm())
        # A block of captions is sent with its task, so that a worker that dies takes nothing along.
        stack.enter_context(dask.config.set({"distributed.admin.large-graph-warning-threshold": "1GB"}))
        address: Any = setting
        if setting == DASK:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mode-dask-", ignore_cleanup_errors=True))
            address = stack.enter_context(_cluster(processes, gpus, folder))
        yield _Dask(stack.enter_context(_client(address, setting)))


class _Dask:
    """The engine of a Dask client."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
        waiting: deque[Future] = deque()
        try:
            for item in items:
                with _one_line():
                    waiting.append(self._client.submit(function, item, pure=False))
                    threads = sum(self._client.nthreads().values())  # more as workers join
                    full = len(waiting) >= AHEAD * max(2, threads)
                if full:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        finally:
            with suppress(OSError):  # the scheduler is gone
                self._client.cancel(list(waiting), force=True)

    def _result(self, future: Future) -> Any:
        with _one_line():
            return future.result()


@contextmanager
def _one_line() -> Iterator[None]:
    """What may go wrong in a cluster, as a `ModeError`; one that a worker raised stays as it is."""
    from concurrent.futures import CancelledError

    from distributed import KilledWorker
    from distributed.comm import CommClosedError

    try:
        yield
    except ModeError:
        raise
    except KilledWorker:
        what = "dask: a worker died over a block, and so did those that tried it again"
        raise ModeError(what, "give workers more memory, or use fewer; see their logs") from None
    except (CancelledError, CommClosedError):
        raise ModeError("dask: the scheduler is gone", "start it again; the embedding goes on where it was") from None
    except Exception as error:
        raise ModeError(f"dask: a worker failed: {type(error).__name__}: {first_line(error)}", "see its log") from error


def _client(address: Any, setting: str) -> Client:
    from distributed import Client

    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ModeError(
            f"machine.engine: no Dask scheduler at {setting}: {first_line(error)}", "start it, or use MODE_ENGINE=local"
        ) from None
    workers = len(client.nthreads())
    print(f"dask: {workers or 'no'} workers{'' if workers else ' yet'} at {setting}", file=sys.stderr, flush=True)
    return client


def _cluster(processes: int, gpus: int, folder: str) -> Any:
    """Processes on this machine, with a scheduler that only this machine can reach."""
    import logging

    from distributed import Nanny, Scheduler, SpecCluster

    # Reached from this machine only, and no page on a fixed port.
    here: dict[str, Any] = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    own = {"nthreads": 1, "memory_limit": 0, "local_directory": folder, "silence_logs": logging.ERROR, **here}
    sees: list[dict[str, str]] = [{}] * processes
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        sees = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible[:gpus]]
    return SpecCluster(
        scheduler={"cls": Scheduler, "options": {"port": 0, **here}},
        workers={number: {"cls": Nanny, "options": {**own, "env": env}} for number, env in enumerate(sees)},
        silence_logs=logging.ERROR,
    )


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a program through its cleanup, as Ctrl-C does: a cluster must not stay behind."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
