"""The endless, repeatable order in which training sees pairs."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from mode.errors import ModeError

#: Keeps the order in which images have their turn apart from the orders of passes.
_TURNS = 1_000_033
#: An image's second visit in a pass draws its caption as an image of this number further on.
_AGAIN = 2**40

#: What SplitMix64 adds to its state from one number to the next.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class PairStream:
    """Passes over images, each in a new random order, each time with one of the image's captions.

    A pass visits every image exactly once, or as often as its factor says. What stands at a sample position depends on
    the seed and that position alone: a run that resumes at any position, with any number of workers, sees what an
    uninterrupted one sees.

    Args:
        rows: int64 [pairs], index rows to draw from: a whole source, or the pairs of one cluster.
        images: int64 [pairs], for each of `rows` the number of its image; rows that share it are captions of one image.
        random_seed: of orders and captions.
        probabilities: float [pairs], how probable each caption of an image is, up to a factor that all of them share;
            default: all are alike.
        factors: float [pairs], how often a pass visits the image of each: 2 is twice; 0.5 is half of the images with
            that factor in one pass and the other half in the next; 2.5 is both. Default: once.

    Attributes:
        images_per_pass: number of distinct images; with factors, of visits.

    Raises:
        ModeError: there are no rows.

    Example:
        >>> stream = PairStream(np.array([3, 4, 7]), np.array([1, 1, 2]), random_seed=0)
        >>> stream.images_per_pass
        2
        >>> bool(np.array_equal(stream.rows_at(1, 3), stream.rows_at(0, 4)[1:]))
        True
    """

    def __init__(
        self,
        rows: np.ndarray,
        images: np.ndarray,
        random_seed: int,
        probabilities: np.ndarray | None = None,
        factors: np.ndarray | None = None,
    ) -> None:
        if len(rows) != len(images):
            raise ValueError(f"{len(rows)} rows, but images of {len(images)}")
        if not len(rows):
            raise ModeError("no pairs to train on", "the cluster is empty: fewer clusters, or more data")
        self.random_seed = random_seed
        order = np.lexsort((rows, images))
        self._rows = np.asarray(rows, np.int64)[order]
        self._images, self._first, self._captions = np.unique(
            np.asarray(images, np.int64)[order], return_index=True, return_counts=True
        )
        # Of all captions up to and including each: what of it falls to an image is cut up among its captions.
        self._cumulative = None if probabilities is None else np.cumsum(probabilities[order], dtype=np.float64)
        self._visits = None if factors is None else _Visits(factors[order][self._first], random_seed)
        self.images_per_pass = len(self._images) if self._visits is None else self._visits.per_pass
        # Two passes: a batch may straddle their boundary.
        self._order_of_pass = lru_cache(maxsize=2)(self._shuffle)

    def rows_at(self, start: int, count: int) -> np.ndarray:
        """Index rows at sample positions `start .. start + count`, int64 [count].

        The first position of a pass costs a shuffle of all images, the others next to nothing.
        """
        parts = []
        while count > 0:
            number, within = divmod(start, self.images_per_pass)
            part = self._order_of_pass(number)[within : within + count]
            parts.append(self._rows_of(number, part))
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _shuffle(self, number: int) -> np.ndarray:
        """Visits of a pass in their order, see `_Visits`; without factors, images."""
        order = np.random.default_rng([self.random_seed, number]).permutation(self.images_per_pass)
        return order if self._visits is None else self._visits.of_pass(number)[order]

    def _rows_of(self, number: int, visits: np.ndarray) -> np.ndarray:
        """A caption for each visit to an image."""
        again, images = np.divmod(visits, len(self._images))
        first, captions = self._first[images], self._captions[images]
        drawn = hash_numbers(self._images[images] + again * _AGAIN, self.random_seed, number)
        if self._cumulative is None:
            place = first + (drawn % captions.astype(np.uint64)).astype(np.int64)
        else:
            before = np.where(first > 0, self._cumulative[first - 1], 0.0)
            last = first + captions - 1
            wanted = before + drawn / 2.0**64 * (self._cumulative[last] - before)
            place = np.searchsorted(self._cumulative, wanted, side="right").clip(first, last)
        rows: np.ndarray = self._rows[place]
        return rows


class _Visits:
    """The images of each pass, where a pass visits some more or less often than once.

    A visit is the number of the image, plus the number of all images for each earlier visit in the same pass. Every
    pass has the same number of visits, so that a position says its pass.

    Args:
        factors: float [images], visits in a pass, above 0. Of n images whose factor has a fractional part f, f * n
            (rounded up) are visited once more: the next ones in an order of their own, so that all have their turn.
        random_seed: of that order.

    Attributes:
        per_pass: visits in one pass.
    """

    def __init__(self, factors: np.ndarray, random_seed: int) -> None:
        whole = np.floor(factors).astype(np.int64)
        images = len(factors)
        rounds = [np.flatnonzero(whole > earlier) + earlier * images for earlier in range(int(whole.max()))]
        self._always = np.concatenate([np.empty(0, np.int64), *rounds])
        self._in_turn: list[tuple[np.ndarray, int]] = []  # visits, and how many of them there are in a pass
        for number, factor in enumerate(np.unique(factors[factors > whole])):
            turns = np.random.default_rng([random_seed, _TURNS, number]).permutation(np.flatnonzero(factors == factor))
            count = math.ceil((factor - math.floor(factor)) * len(turns) - 1e-6)
            self._in_turn.append((turns + whole[turns] * images, max(count, 1)))
        self.per_pass = len(self._always) + sum(count for _, count in self._in_turn)

    def of_pass(self, number: int) -> np.ndarray:
        """Visits of a pass in no particular order, int64 [per_pass]."""
        parts = [self._always]
        for visits, count in self._in_turn:
            begin = number * count % len(visits)
            parts.append(visits.take(np.arange(begin, begin + count), mode="wrap"))
        return np.concatenate(parts)


def hash_numbers(numbers: np.ndarray, *keys: int) -> np.ndarray:
    """Mix numbers with keys into independent, uniform 64-bit numbers (SplitMix64, Steele et al., OOPSLA 2014).

    Args:
        numbers: integers of any shape, such as sample positions.
        keys: tell one use from another: a seed, a pass, a purpose.

    Returns:
        uint64 of the same shape; the same for the same numbers and keys, on any machine.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        for key in keys:
            state = mix(state + np.uint64(key % 2**64) * GOLDEN + GOLDEN)
        return mix(state + (np.asarray(numbers).astype(np.uint64) + np.uint64(1)) * GOLDEN)


def mix(state: np.ndarray) -> np.ndarray:
    """One output of SplitMix64 for each state, uint64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(state ^ (state >> np.uint64(31)))
