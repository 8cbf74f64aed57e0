"""Batches of pairs for training: the stream's order, the store's images, read ahead."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mode.data.loading.augment import augment_batch
from mode.data.loading.shares import Shares
from mode.data.loading.spool import Spool
from mode.data.loading.store import ImageStore, replacements
from mode.data.loading.stream import PairStream
from mode.errors import ModeError
from mode.parallel import Threads, in_order

__all__ = ["Batch", "ImageStore", "PairStream", "Shares", "augment_batch", "make_loader"]

_log = logging.getLogger(__name__)

#: Batches that are read ahead without worker processes, and by each of these.
_AHEAD, _AHEAD_OF_WORKER = 4, 2
#: Seconds after which it is asked whether a batch is still to be waited for; and those that a thread which reads is
#: given to end: decoding is done by then, and if it waits for a store, it is left to itself.
_LOOK, _END = 0.5, 3.0


class NotWaitedFor(Exception):
    """A batch is not there, and is not to be waited for any longer."""


@dataclass(frozen=True)
class Batch:
    """What one process trains on in one step.

    Attributes:
        rows: int64 [b], rows of the index; where an image was bad, the row that replaces it, so that captions and
            images agree.
        images: uint8 [b, 3, size, size].
        positions: int64 [b], sample position of each, ascending, for `augment_batch`.
        position: sample position after the whole batch of all processes: where to go on.
        bad: int64, rows whose image could not be read.
    """

    rows: np.ndarray
    images: torch.Tensor
    positions: np.ndarray
    position: int
    bad: np.ndarray


@dataclass
class _Batches(Dataset["Batch | ModeError"]):
    """Batches by number; any of them can be asked for at any time, in any process.

    A `ModeError` is given back in place of a batch: torch would wrap one raised in a worker into a traceback.
    """

    store: ImageStore
    stream: PairStream
    shares: Shares

    def __len__(self) -> int:
        return len(self.shares)

    def __getitem__(self, number: int) -> Batch | ModeError:
        positions = self.shares.of(number)
        rows = self.stream.rows_at_each(positions)
        try:
            images, good = self.store.load(rows, positions, self.stream.random_seed)
        except ModeError as error:
            return error
        return Batch(rows[replacements(good)], images, positions, self.shares.span(number)[1], rows[~good])


def make_loader(
    store: ImageStore,
    stream: PairStream,
    shares: Shares,
    *,
    workers: int,
    spool: Spool | None = None,
    gives_up: Callable[[], object] = lambda: False,
) -> Generator[Batch, None, None]:
    """Batches of a training, of each the share of this process.

    The batches are the same whatever `workers`, and the same whether one began at a position or came there.

    Args:
        store: where images come from; its `bad` counts what was replaced.
        stream: which pairs, in which order.
        shares: of which sample positions, and who takes which.
        workers: processes that read and decode; 0 reads ahead in one thread of this process, which is faster where
            decoded images are kept.
        spool: to be cleared of what all processes of this machine are done with, when this one asks for the next batch.
        gives_up: asked while a batch is waited for; true is not to wait any longer.

    Raises:
        NotWaitedFor: `gives_up` was true.
        ModeError: not one image of a batch can be read; a shard is not the one that was indexed; a server does not
            answer.
    """
    batches = _Batches(store, stream, shares)
    # A forked process cannot use a GPU; where that decodes, a thread has nothing to do but to read.
    in_processes = workers > 0 and store.device.type == "cpu"
    reading = _in_processes(batches, workers, gives_up) if in_processes else _in_thread(batches, gives_up)
    reported: set[int] = set()
    with closing(reading):
        for batch in reading:
            if isinstance(batch, ModeError):
                raise batch
            if len(batch.bad):
                _report(store, batch, reported)
            yield batch
            if spool is not None:
                spool.pass_by(batch.position)


def samples_ahead(batch_size: int, workers: int) -> int:
    """Sample positions, at most, between the first of a batch that `make_loader` gives and the last that it reads."""
    return batch_size * (1 + max(_AHEAD + 1, workers * _AHEAD_OF_WORKER))


def _in_thread(batches: _Batches, gives_up: Callable[[], object]) -> Generator[Batch | ModeError, None, None]:
    threads = Threads(1, "images")

    def result(future: Future[Any]) -> Any:
        while True:
            try:
                return future.result(_LOOK)
            except TimeoutError:
                if future.done():  # it is the work's own
                    raise
                if gives_up():
                    raise NotWaitedFor from None

    def submit(number: int) -> Future[Batch | ModeError]:
        return threads.submit(partial(batches.__getitem__, number))

    try:
        yield from in_order(submit, range(len(batches)), _AHEAD, result)
    finally:
        threads.close(_END)


def _in_processes(
    batches: _Batches, workers: int, gives_up: Callable[[], object]
) -> Generator[Batch | ModeError, None, None]:
    """Forked, so that all share the store's memory; whole batches, in order."""
    loader = DataLoader(
        batches,
        batch_size=None,
        num_workers=min(workers, len(batches)),
        prefetch_factor=_AHEAD_OF_WORKER,
        multiprocessing_context="fork",
        timeout=_LOOK,
    )
    others = active_children()
    ahead = iter(loader)
    while True:
        try:
            batch = next(ahead, None)
        except (ConnectionError, EOFError) as error:  # torch has not yet heard of its end
            raise RuntimeError(f"DataLoader worker died while it handed over a batch: {error}") from None
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            if gives_up():
                for process in set(active_children()) - set(others):
                    process.terminate()  # it would be waited for as long as for the batch
                raise NotWaitedFor from None
            continue
        if batch is None:
            return
        yield batch


def _report(store: ImageStore, batch: Batch, reported: set[int]) -> None:
    store.bad += len(batch.bad)
    if len(batch.bad) == len(batch.rows):
        raise ModeError(
            f"{store.place_of(batch.bad[0])}: cannot be read, nor any other of {len(batch.bad)} images of a batch",
            "`mode verify SHARDS` says what is wrong with them",
        )
    for row in set(batch.bad.tolist()) - reported:
        _log.warning("%s: image cannot be read, another takes its place", store.place_of(row))
        reported.add(row)
