from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode.clustering.assignment import Assignment
from mode.clustering.drift import ADVISED_PAIRS, ADVISED_SHARE, Counts, Drift, drift


def assigned(distances: list[float], coarse: list[int]) -> Assignment:
    kinds = (np.array(coarse, np.int32), np.array(coarse, np.int32), np.array(distances, np.float32))
    return Assignment(*kinds)


def counts(distances: list[float], coarse: list[int] | None = None, clusters: int = 1) -> Counts:
    return Counts.of([assigned(distances, coarse or [0] * len(distances))], clusters)


def test_far_is_what_is_beyond_all_but_a_hundredth_of_the_old() -> None:
    """Of 200 captions 198 are the near ones; the two that are farther are 1%."""
    old = counts([0.5] * 198 + [0.9, 1.0])
    assert drift("base", old, "base", old).far == 2
    found = drift("base-2", counts([0.5, 0.51, 0.2, 1.9]), "base", old)
    assert (found.far, found.far_share) == (2, 0.5)
    assert found.threshold == pytest.approx(0.5, abs=1e-4)


def test_clusters_that_fill_up_are_named_and_others_are_not() -> None:
    old = counts([0.5] * 10, [0] * 5 + [1] * 4 + [2], 3)
    new = counts([0.5] * 10, [0] * 3 + [1] * 4 + [2] * 3, 3)
    found = drift("base-2", new, "base", old)
    assert [(each.share, each.new_share) for each in found.clusters] == [(0.5, 0.3), (0.4, 0.4), (0.1, 0.3)]
    assert [each.number for each in found.clusters if each.fills_up] == [2]
    assert found.sentences() == [
        "base-2: 0.0% of 10 captions are farther from every centre than 99% of those of base (without a change it would"
        " be 1%).",
        "base-2: cluster 2 fills up: 30% of the new pairs are in it, 10% of those of base.",
    ]


@pytest.mark.parametrize(
    ("pairs", "far", "advised"),
    [
        (100 * ADVISED_PAIRS, 100 * ADVISED_PAIRS * ADVISED_SHARE, True),
        (100 * ADVISED_PAIRS, 100 * ADVISED_PAIRS * ADVISED_SHARE - 1, False),
        (ADVISED_PAIRS, ADVISED_PAIRS, True),
        (ADVISED_PAIRS, ADVISED_PAIRS - 1, False),
    ],
)
def test_an_expert_is_advised_where_share_and_number_are_large(pairs: int, far: float, advised: bool) -> None:
    found = Drift("base-2", "base", pairs, 0.5, int(far), [])
    assert found.needs_expert == advised
    assert ("mode add-source" in " ".join(found.sentences())) == advised


distances = st.lists(st.integers(0, 2**16 - 1).map(lambda step: (step + 0.5) / 2**15), min_size=1, max_size=300)


@given(old=distances, new=distances, cut=st.integers(0, 300))
def test_counted_in_blocks_as_sorted_at_once(old: list[float], new: list[float], cut: int) -> None:
    """Against the definition: the least distance that 99 of 100 do not exceed, and how many exceed it."""
    near = sorted(old)[int(np.ceil(0.99 * len(old))) - 1]
    blocks = [assigned(part, [0] * len(part)) for part in (new[:cut], new[cut:])]
    found = drift("b", Counts.of(blocks, 1), "a", counts(old))
    assert found.far == sum(distance > near for distance in new)
    assert found.pairs == len(new)
