"""Whether numbers can be those of unit vectors: what tells damage, at next to no cost."""

from __future__ import annotations

import numpy as np

#: Numbers of a unit vector are at most 1; a little more is rounding.
LARGEST = 1.001


def within(numbers: np.ndarray, largest: float) -> bool:
    """Whether all numbers are finite and none is farther from 0 than `largest`.

    Floats of one sign have the order of their bits, so that two maxima over whole numbers say it, which a processor
    finds as fast as it reads; NaN and infinity are the highest. No copy is made.

    Args:
        numbers: float16, float32 or float64, of any shape.
        largest: at least 0.

    Example:
        >>> within(np.array([-1, 0.5], np.float16), 1), within(np.array([np.nan, 0], np.float16), 1)
        (True, False)
    """
    if not numbers.size:
        return True
    numbers = np.ascontiguousarray(numbers)
    width = numbers.dtype.itemsize
    signed, unsigned = np.dtype(f"i{width}"), np.dtype(f"u{width}")
    limit, sign = int(numbers.dtype.type(largest).view(unsigned)), 1 << (8 * width - 1)
    # As signed numbers all negative floats are below 0; as unsigned ones all are above the positive ones.
    return int(numbers.view(signed).max()) <= limit and int(numbers.view(unsigned).max()) <= sign + limit
