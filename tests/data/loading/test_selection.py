from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode.data.loading.selection import expert_rows, held_out_images, held_out_pairs, without_held_out
from mode.errors import ModeError

COARSE = np.array([0, 1, 0, 2, 1, 0, 2, 2, 1, 0], dtype=np.int32)


def test_without_outside_pairs_it_is_the_cluster() -> None:
    rows = expert_rows(COARSE, cluster=1, outside_share=0.0, random_seed=0)
    assert rows.tolist() == [1, 4, 8]
    assert rows.dtype == np.int64


def test_all_outside_pairs_make_it_everything() -> None:
    assert expert_rows(COARSE, cluster=1, outside_share=1.0, random_seed=0).tolist() == list(range(10))


@given(
    coarse=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_own_pairs_are_all_there_and_the_share_is_of_the_outside(coarse: list[int], share: float, seed: int) -> None:
    assigned = np.array(coarse, dtype=np.int32)
    rows = expert_rows(assigned, cluster=coarse[0], outside_share=share, random_seed=seed)
    inside = assigned[rows] == coarse[0]
    assert inside.sum() == (assigned == coarse[0]).sum()
    assert (~inside).sum() == round(share * (assigned != coarse[0]).sum())
    assert (np.diff(rows) > 0).all()
    assert (rows == expert_rows(assigned, cluster=coarse[0], outside_share=share, random_seed=seed)).all()


def test_seed_and_cluster_change_the_sample() -> None:
    coarse = np.repeat(np.arange(3, dtype=np.int32), 100)

    def outside(cluster: int, seed: int) -> set[int]:
        rows = expert_rows(coarse, cluster, 0.2, seed)
        return set(rows[coarse[rows] == 2].tolist())

    assert outside(0, seed=0) != outside(0, seed=1)
    assert outside(0, seed=0) != outside(1, seed=0)


def test_an_empty_cluster_is_refused() -> None:
    with pytest.raises(ModeError, match="cluster 7 has no pairs"):
        expert_rows(COARSE, cluster=7, outside_share=0.1, random_seed=0)


def test_held_out_images_are_as_many_as_asked_for_and_depend_on_the_seed() -> None:
    masks = [held_out_images(50, count, random_seed=0) for count in (0, 1, 49)]
    assert [int(mask.sum()) for mask in masks] == [0, 1, 49]
    assert (held_out_images(500, 20, 1) == held_out_images(500, 20, 1)).all()
    assert (held_out_images(500, 20, 1) != held_out_images(500, 20, 2)).any()
    with pytest.raises(ModeError, match="held_out: 50 of 50 images"):
        held_out_images(50, 50, 0)


@given(images=st.lists(st.integers(0, 11), min_size=12, max_size=40), count=st.integers(0, 12), seed=st.integers(0, 5))
def test_held_out_pairs_are_those_left_out_one_of_each_image(images: list[int], count: int, seed: int) -> None:
    image = np.array([*range(12), *images])
    rows = np.arange(3, len(image))
    left = set(rows) - set(without_held_out(rows, image, 6, seed))
    pairs = held_out_pairs(rows, image, 6, count, seed)
    assert set(pairs) <= left
    wanted = {image[row] for row in left}
    assert len(pairs) == len(set(image[pairs])) == min(count, len(wanted))
    assert set(pairs) <= set(held_out_pairs(rows, image, 6, count + 1, seed))
