"""Numbers and orders that look random and are functions of a few keys: the same on any machine, and kept nowhere."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: What SplitMix64 adds to its state from one number to the next.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)

#: Rounds of the Feistel network. Four make a random function look like a random permutation (Luby and Rackoff, 1988),
#: where the halves have many bits; these may have 5.
_ROUNDS = 8
#: So few numbers are sorted by what they hash to: halves of fewer bits have not enough round functions to choose from.
_FEW = 256
#: Keeps the keys of rounds apart from other numbers with the same keys.
_ROUND_KEYS = 1_000_037


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


def permuted(numbers: np.ndarray, size: int, *keys: int) -> NDArray[np.int64]:
    """Where a random permutation of 0 .. size - 1 takes numbers, without an array of all of them.

    A balanced Feistel network permutes the numbers of the next even count of bits; what lies beyond `size` goes through
    it again until it does not (cycle walking: Black and Rogaway, CT-RSA 2002), less than four times on average. The
    first k numbers go to a uniform sample of k without repetition, in random order.

    Args:
        numbers: int [n], each from 0 to size - 1.
        size: of the permutation, 1 to 2**62.
        keys: choose the permutation: a seed, a pass, a purpose.

    Returns:
        int64 [n]; distinct where `numbers` are.

    Example:
        >>> sorted(permuted(np.arange(5), 5, 7).tolist())
        [0, 1, 2, 3, 4]
    """
    places = np.array(numbers, np.uint64)
    if size <= _FEW:
        return np.argsort(hash_numbers(np.arange(size), *keys, _ROUND_KEYS), kind="stable")[places.astype(np.int64)]
    bits = np.uint64(-(-(size - 1).bit_length() // 2))
    mask, round_keys = np.uint64(2 ** int(bits) - 1), hash_numbers(np.arange(_ROUNDS), *keys, _ROUND_KEYS)
    outside = np.arange(len(places))
    while len(outside):
        left, right = places[outside] >> bits, places[outside] & mask
        for key in round_keys:
            left, right = right, left ^ (mix(right + key) & mask)
        walked = left << bits | right
        places[outside] = walked
        outside = outside[walked >= np.uint64(size)]
    return places.astype(np.int64)
