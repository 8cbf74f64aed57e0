"""The endless, repeatable order in which training sees pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mode.checksums import ADVICE
from mode.columns import Numbers, spans
from mode.data.loading.selection import Pairs
from mode.data.loading.windows import CHUNK, Windows
from mode.errors import ModeError
from mode.permutation import hash_numbers, permuted

# Keep the orders of passes and the order in which images have their turn apart.
_PASS, _TURNS = 1_000_099, 1_000_033
#: An image's second visit in a pass draws its caption as an image of this number further on.
_AGAIN = 2**40


class Chunk(NamedTuple):
    """Neighbouring images that a stream visits at about the same time: of a pass, a window of it, and a slot of that.

    Chunks of a stream are in the order in which they are read.
    """

    number: int
    window: int
    slot: int


class Window(NamedTuple):
    """Chunks whose images are mixed with one another, and the first sample position of them."""

    begin: int
    chunks: list[Chunk]


class PairStream:
    """Passes over images, each in a new random order, each time with one of the image's captions.

    A pass visits every image exactly once, or as often as its factor says. What stands at a sample position depends on
    the seed and that position alone, and is worked out where it is asked for: a run that resumes at any position, with
    any number of workers, sees what an uninterrupted one sees, and no order of all images is in memory.

    A factor of 2 visits an image twice a pass; 0.5 half of the images with that factor in one pass and the other half
    in the next; 2.5 is both. Of n images whose factor has a fractional part f, f * n (rounded up) are visited once
    more: the next ones in an order of their own, so that all have their turn.

    With `shuffle_images` the order is one to be read in long ranges, see `Windows`: neighbours of the index come near
    each other. All else stays as it is; of images with a fractional factor, neighbours have their turn together.

    Args:
        pairs: what to draw from: a whole source, or the pairs of one cluster.
        images: int64 [pairs of the index], number of the image of each.
        random_seed: of orders and captions.
        probabilities: float [pairs of the index], how probable each caption of an image is, up to a factor that all of
            them share; default: all are alike.
        shuffle_images: images that are mixed with one another; default: all of a pass.

    Attributes:
        images_per_pass: number of distinct images; with factors, of visits.

    Raises:
        ModeError: there are no pairs. When rows are asked for: the files of the pairs are damaged.

    Example:
        >>> image = np.array([0, 0, 0, 1, 1, 2])
        >>> stream = PairStream(Pairs.of(np.array([3, 4, 5]), image), image, random_seed=0)
        >>> stream.images_per_pass
        2
        >>> bool(np.array_equal(stream.rows_at(1, 3), stream.rows_at(0, 4)[1:]))
        True
    """

    def __init__(
        self,
        pairs: Pairs,
        images: Numbers,
        random_seed: int,
        probabilities: Numbers | None = None,
        shuffle_images: int | None = None,
    ) -> None:
        if not len(pairs):
            raise ModeError("no pairs to train on", "the cluster is empty: fewer clusters, or more data")
        self.random_seed = random_seed
        self._pairs, self._images, self._probabilities = pairs, images, probabilities
        self._visits = _Visits(pairs.factors, random_seed, together=1 if shuffle_images is None else CHUNK)
        self.images_per_pass = self._visits.per_pass
        self._windows = None if shuffle_images is None else Windows(self.images_per_pass, shuffle_images, random_seed)

    def rows_at(self, start: int, count: int) -> NDArray[np.int64]:
        """Index rows at sample positions `start .. start + count`, int64 [count]."""
        return self.rows_at_each(np.arange(start, start + count))

    def rows_at_each(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index rows at sample positions, int64 [n]."""
        numbers, within = np.divmod(positions, self.images_per_pass)
        rows = np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            some = numbers == number
            rows[some] = self._rows_of(number, self._visits_at(number, within[some]))
        return rows

    @property
    def windows(self) -> Windows:
        """The order of a pass of a stream with `shuffle_images`."""
        assert self._windows is not None
        return self._windows

    def found_at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Number of the chunk that holds the image at each sample position, and of the image in the training's pairs.

        Both int64 [n]; chunks are numbered in the order in which they are read.
        """
        numbers, within = np.divmod(positions, self.images_per_pass)
        chunks, images = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            some = numbers == number
            slots, visits = self.windows.found_at(number, within[some])
            chunks[some] = number * self.windows.slots + slots
            images[some], _ = self._visits.images_of(number, visits)
        return chunks, images

    def chunks_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the chunk that holds the image at each sample position, int64 [n]."""
        return self.found_at(positions)[0]

    def chunk(self, number: int) -> Chunk:
        """A chunk by its number."""
        in_pass, slot = divmod(number, self.windows.slots)
        return Chunk(in_pass, slot // self.windows.slots_per_window, slot)

    def windows_from(self, start: int, stop: int) -> Iterator[Window]:
        """The window at a sample position and those behind it, as far as they begin before `stop`."""
        number, within = divmod(start, self.images_per_pass)
        window = self.windows.window_of(number, within)
        while (begin := self.span(number, window)[0]) < stop:
            yield Window(begin, [Chunk(number, window, slot) for slot in self.windows.slots_in(window)])
            number, window = (number, window + 1) if window + 1 < self.windows.per_pass else (number + 1, 0)

    def span(self, number: int, window: int) -> tuple[int, int]:
        """First sample position of a window of a pass, and the one behind its last."""
        start, stop = self.windows.span(number, window)
        return number * self.images_per_pass + start, number * self.images_per_pass + stop

    def first_rows(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first row of the training of each of its images, by their numbers among its pairs."""
        return self._rows_in(self._pairs.first[images])

    def _visits_at(self, number: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._windows is not None:
            return self._windows.visits_at(number, positions)
        return permuted(positions, self.images_per_pass, self.random_seed, number, _PASS)

    def _rows_of(self, number: int, visits: NDArray[np.int64]) -> NDArray[np.int64]:
        """A caption for each visit to an image."""
        images, again = self._visits.images_of(number, visits)
        begin, end = spans(self._pairs.first, images).T
        if not (begin.min() >= 0 and (begin < end).all() and end.max() <= len(self._pairs)):
            raise ModeError("the pairs of the training are damaged: an image has none", ADVICE)
        drawn = hash_numbers(self._images[self._rows_in(begin)] + again * _AGAIN, self.random_seed, number)
        if self._probabilities is None:
            place = begin + (drawn % (end - begin).astype(np.uint64)).astype(np.int64)
        else:
            place = self._probable(begin, end - begin, drawn / 2.0**64)
        return self._rows_in(place)

    def _probable(
        self, begin: NDArray[np.int64], captions: NDArray[np.int64], drawn: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Place of the caption of each image that a number from 0 to 1 falls to."""
        assert self._probabilities is not None
        place = begin.copy()
        # By number of captions: each image by itself, so that no sum depends on what else is asked for.
        for count in np.unique(captions).tolist():
            some = np.flatnonzero(captions == count)
            rows = self._rows_in((begin[some, None] + np.arange(count)).ravel())
            ends = np.cumsum(self._probabilities[rows].reshape(-1, count), axis=1, dtype=np.float64)
            place[some] += (ends <= (drawn[some] * ends[:, -1])[:, None]).sum(axis=1).clip(max=count - 1)
        return place

    def _rows_in(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the index by their place among those of the training."""
        rows: NDArray[np.int64] = self._pairs.rows[places]
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self._images)):
            raise ModeError("the pairs of the training are damaged: a row is not in the index", ADVICE)
        return rows


class _Visits:
    """The images of each pass, where a pass visits some more or less often than once.

    Every pass has the same number of visits, so that a position says its pass. Visits are numbered: first those that
    every pass makes, then those of images that have their turn.

    Args:
        factors: (images, factor) of consecutive images; factors are above 0.
        random_seed: of the order in which images have their turn.
        together: neighbours that have their turn one after the other.

    Attributes:
        per_pass: visits in one pass.
    """

    def __init__(self, factors: Sequence[tuple[int, float]], random_seed: int, together: int = 1) -> None:
        self._random_seed, self._together = random_seed, together
        images, of_each = np.array([images for images, _ in factors]), np.array([factor for _, factor in factors])
        first, whole = np.cumsum(images) - images, np.floor(of_each).astype(np.int64)
        always = [(run, earlier) for earlier in range(int(whole.max())) for run in np.flatnonzero(whole > earlier)]
        in_turn = np.unique(of_each[of_each > whole])
        self._turns = [(first[of_each == factor], images[of_each == factor]) for factor in in_turn]
        totals = [int(images.sum()) for _, images in self._turns]
        counts = [
            max(1, math.ceil((factor - math.floor(factor)) * total - 1e-6))
            for factor, total in zip(in_turn.tolist(), totals, strict=True)
        ]
        # Of each part of a pass: its visits, the first image, and which visit in the pass it is to an image.
        self._counts = np.array([*(images[run] for run, _ in always), *counts], np.int64)
        self._first = np.array([*(first[run] for run, _ in always), *(0 for _ in counts)], np.int64)
        self._again = np.array([*(earlier for _, earlier in always), *(math.floor(each) for each in in_turn)], np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self.per_pass = int(self._counts.sum())

    def images_of(self, number: int, visits: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Image of each visit of a pass, and how often the pass has visited it before."""
        part = np.searchsorted(self._starts, visits, side="right") - 1
        within = visits - self._starts[part]
        images = self._first[part] + within
        for turn, (first, counts) in enumerate(self._turns):
            which = len(self._starts) - len(self._turns) + turn
            mine = part == which
            total = int(counts.sum())
            places = (within[mine] + number * int(self._counts[which]) % total) % total
            places = self._in_turn(places, total, turn)
            run = np.searchsorted(np.cumsum(counts), places, side="right")
            images[mine] = first[run] + places - (np.cumsum(counts) - counts)[run]
        return images, self._again[part]

    def _in_turn(self, places: NDArray[np.int64], total: int, turn: int) -> NDArray[np.int64]:
        """Which of so many images have their turn at these places: neighbours together, the last few at the end."""
        groups, within = np.divmod(places, self._together)
        whole = total // self._together
        is_whole = groups < whole
        groups[is_whole] = permuted(groups[is_whole], max(whole, 1), self._random_seed, _TURNS, turn)
        return groups * self._together + within
