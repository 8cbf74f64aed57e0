"""An order of visits in which neighbours come near each other, and are yet well mixed: chunks, and windows of chunks.

Object storage reads long ranges as fast as it likes and single images slowly. Trainers that read tars from end to end
mix samples in a buffer, whose content depends on all that was read before. Here the buffer is a formula: what stands
at a position depends on the seed and that position alone, so that a training can begin anywhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mode.permutation import hash_numbers, permuted

#: Neighbours that are read together: 5 MB of images of 20 kB, for which one request is hardly dearer than its bytes.
CHUNK = 256

# Keep the orders of chunks, of visits within a window, and the place of the short chunk apart.
_CHUNKS, _WITHIN, _SHORT = 1_000_121, 1_000_133, 1_000_151


class Windows:
    """The order of a pass: chunks of neighbours in random order, and so many of them at a time mixed.

    Visits are numbered so that neighbours have images side by side. `chunk` consecutive ones are a chunk; the last may
    be shorter. A pass has its chunks in random order, where each has a *slot*; the short one has a random slot of its
    own. As many slots as `shuffle_images` holds are a *window*, within which visits are permuted.

    Args:
        visits: of a pass, at least one.
        shuffle_images: visits of a window, rounded down to whole chunks; one chunk at least, which is then as short.
        random_seed: of the orders.
        chunk: visits of a chunk, at most.

    Attributes:
        per_pass: windows of a pass.
        slots: chunks of a pass.
        slots_per_window: chunks of a window, but for the last one of a pass.

    Example:
        >>> windows = Windows(10, 4, 0, chunk=2)
        >>> windows.per_pass, sorted(windows.visits_at(0, np.arange(10)).tolist()) == list(range(10))
        (3, True)
    """

    def __init__(self, visits: int, shuffle_images: int, random_seed: int, chunk: int = CHUNK) -> None:
        self._visits, self._random_seed = visits, random_seed
        self._chunk = min(chunk, shuffle_images)
        self._full, self._rest = divmod(visits, self._chunk)
        self.slots = self._full + bool(self._rest)
        self.slots_per_window = min(shuffle_images // self._chunk, self.slots)
        self.per_pass = -(-self.slots // self.slots_per_window)

    def visits_at(self, number: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Visits of pass `number` at these positions within the pass, int64 of the same shape [n]."""
        return self.found_at(number, positions)[1]

    def found_at(self, number: int, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Slot of the chunk that holds the visit at each position within pass `number`, and the visit; int64 [n]."""
        places = self._places(number, positions)
        slots = self._slots_at(number, places)
        return slots, self._first_visits(number, slots) + places - self._starts(number, slots)

    def window_of(self, number: int, position: int) -> int:
        """The window of a position within pass `number`."""
        return int(self._slots_at(number, np.array([position]))[0]) // self.slots_per_window

    def slots_in(self, window: int) -> range:
        """Slots of a window, in order."""
        first = window * self.slots_per_window
        return range(first, min(first + self.slots_per_window, self.slots))

    def span(self, number: int, window: int) -> tuple[int, int]:
        """First position of a window within pass `number`, and the one behind its last."""
        slots = self.slots_in(window)
        start, stop = self._starts(number, np.array([slots.start, slots.stop])).tolist()
        return start, stop

    def _places(self, number: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the permutation within each position's window takes it, as a position of the order of chunks."""
        places = np.empty(len(positions), np.int64)
        windows = self._slots_at(number, positions) // self.slots_per_window
        for window in np.unique(windows).tolist():
            mine = windows == window
            start, stop = self.span(number, window)
            within = permuted(positions[mine] - start, stop - start, self._random_seed, number, _WITHIN, window)
            places[mine] = start + within
        return places

    def _slots_at(self, number: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slot of each place in the order of chunks."""
        short = self._short_slot(number)
        start = short * self._chunk
        behind = (places >= start) & (short < self.slots)
        slots = np.where(behind, (places - self._rest) // self._chunk + bool(self._rest), places // self._chunk)
        in_short = behind & (places < start + self._rest)
        return np.where(in_short, short, slots).astype(np.int64)

    def _starts(self, number: int, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """First place of each slot in the order of chunks; of the slot behind the last, the number of visits."""
        return slots * self._chunk - (slots > self._short_slot(number)) * (self._chunk - self._rest)

    def _first_visits(self, number: int, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """First visit of the chunk in each slot."""
        short = self._short_slot(number)
        chunks = np.full(len(slots), self._full)
        is_full = slots != short
        places = slots[is_full] - (slots[is_full] > short)
        chunks[is_full] = permuted(places, max(self._full, 1), self._random_seed, number, _CHUNKS)
        return chunks * self._chunk

    def _short_slot(self, number: int) -> int:
        """Slot of the short chunk in a pass; behind all slots where there is none."""
        if not self._rest:
            return self.slots
        drawn = hash_numbers(np.array(number), self._random_seed, _SHORT)
        return int(drawn % np.uint64(self.slots))
