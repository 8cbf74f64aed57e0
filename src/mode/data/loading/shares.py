"""Which samples of each batch a process takes, and so which images its machine has to fetch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class Shares:
    """Every batch of a training, dealt out to its processes.

    A batch has the same samples whoever takes part. On one machine, process r takes the r-th slice of it. Of several
    machines that read in chunks each has chunks of its own and takes the samples that lie there, so that it fetches
    little else. As every process takes equally many, some are too many: those of a machine's last chunks in a batch,
    which go to machines that have too few. Processes of a machine take slices of its samples.

    Args:
        start, stop: sample positions of the training, or of what is left of it.
        batch_size: of all processes together; the last batch may be smaller.
        rank: number of this process.
        machines: of each process the number of its machine, 0 .., neighbours side by side.
        chunks: gives for sample positions, int64 [n], the numbers of the chunks that they are read from, int64 [n], in
            the order in which chunks are read; None where images are read one by one.

    Attributes:
        machine: number of this process's machine.

    Example:
        >>> [Shares(0, 10, 4, rank, (0, 0)).of(2).tolist() for rank in (0, 1)]
        [[8], [9]]
    """

    def __init__(
        self,
        start: int,
        stop: int,
        batch_size: int,
        rank: int = 0,
        machines: tuple[int, ...] = (0,),
        chunks: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None,
    ) -> None:
        self.start, self.stop, self.batch_size = start, stop, batch_size
        self.machine = machines[rank]
        self._rank, self._machines, self._chunks = rank, np.array(machines), chunks
        # Chunks go to processes in turns, first to the first of each machine, and so to machines as evenly as can be.
        counts = np.bincount(machines)
        turn = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        self._owners = self._machines[np.argsort(turn, kind="stable")]
        self._machine_of_each: Callable[[int], NDArray[np.int64]] = lru_cache(4)(self._dealt)

    def __len__(self) -> int:
        """Batches."""
        return (self.stop - self.start + self.batch_size - 1) // self.batch_size

    def span(self, number: int) -> tuple[int, int]:
        """First sample position of a batch, and the one behind its last."""
        begin = self.start + number * self.batch_size
        return begin, min(begin + self.batch_size, self.stop)

    def of(self, number: int) -> NDArray[np.int64]:
        """Sample positions of a batch that this process takes, ascending."""
        here = self.span(number)[0] + np.flatnonzero(self._machine_of_each(number) == self.machine)
        sizes, before = self._sizes(number), self._machines[: self._rank] == self.machine
        first = int(sizes[: self._rank][before].sum())
        return here[first : first + int(sizes[self._rank])]

    def here(self, begin: int, end: int) -> NDArray[np.int64]:
        """Sample positions from `begin` to before `end` that the processes of this machine take, ascending."""
        begin, end = max(begin, self.start), min(end, self.stop)
        if begin >= end:
            return np.empty(0, np.int64)
        first, last = (begin - self.start) // self.batch_size, (end - 1 - self.start) // self.batch_size
        machine = np.concatenate([self._machine_of_each(number) for number in range(first, last + 1)])
        positions = self.span(first)[0] + np.flatnonzero(machine == self.machine)
        return positions[(positions >= begin) & (positions < end)]

    def _sizes(self, number: int) -> NDArray[np.int64]:
        """How many samples of a batch each process takes."""
        begin, end = self.span(number)
        world = len(self._machines)
        sizes: NDArray[np.int64] = np.diff((end - begin) * np.arange(world + 1) // world)
        return sizes

    def _dealt(self, number: int) -> NDArray[np.int64]:
        """The machine that takes each sample of a batch."""
        sizes = self._sizes(number)
        if self._chunks is None or len(self._owners) == 1 or self._machines[-1] == 0:
            return np.repeat(self._machines, sizes)
        chunks = self._chunks(np.arange(*self.span(number)))
        owner = self._owners[chunks % len(self._owners)]
        room = np.bincount(self._machines, sizes).astype(np.int64)
        order = np.lexsort((chunks, owner))
        own = np.bincount(owner, minlength=len(room))
        is_kept = np.arange(len(order)) - (np.cumsum(own) - own)[owner[order]] < room[owner[order]]
        spare = order[~is_kept]
        spare = spare[np.argsort(chunks[spare], kind="stable")]  # neighbours go to one machine together
        owner[spare] = np.repeat(np.arange(len(room)), room - np.minimum(own, room))
        return owner
