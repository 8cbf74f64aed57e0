"""Random numbers that depend on a number's place only, whatever was asked for before: the ground of exact resume."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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
            state = _mix(state + np.uint64(key % 2**64) * _GOLDEN + _GOLDEN)
        return _mix(state + (np.asarray(numbers).astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(state ^ (state >> np.uint64(31)))
