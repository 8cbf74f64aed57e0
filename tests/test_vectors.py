"""Numbers of unit vectors: the same answer as the plain comparison, whatever the bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mode.vectors import within


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@given(data=st.data(), largest=st.sampled_from([0.0, 0.5, 1.0, 1.001, 1000.0]))
def test_as_a_plain_comparison(kind: type, data: st.DataObject, largest: float) -> None:
    numbers = data.draw(arrays.arrays(kind, arrays.array_shapes(max_dims=2, min_side=0, max_side=6)))
    with np.errstate(invalid="ignore"):
        assert within(numbers, largest) == bool((np.abs(numbers) <= kind(largest)).all())
        assert within(numbers[::-1], largest) == within(numbers, largest)


def test_every_half_precision_number() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    sound = np.abs(every) <= np.float16(1.001)
    assert [within(every[place : place + 1], 1.001) for place in range(len(every))] == sound.tolist()
