from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mode.data.loading.selection import (
    Pairs,
    every_row,
    expert_rows,
    held_out_pairs,
    is_held_out,
    some_rows,
    write_pairs,
)
from mode.data.shards.index import PairIndex
from mode.errors import ModeError

COARSE = np.array([0, 1, 0, 2, 1, 0, 2, 2, 1, 0], dtype=np.int32)


def rows_of(coarse: np.ndarray, cluster: int, outside_share: float, random_seed: int, blocks: int = 3) -> np.ndarray:
    """All blocks of `expert_rows` together."""
    parts = expert_rows(lambda: iter(np.array_split(coarse, blocks)), cluster, outside_share, random_seed)
    return np.concatenate([*parts])


def test_without_outside_pairs_it_is_the_cluster() -> None:
    rows = rows_of(COARSE, cluster=1, outside_share=0.0, random_seed=0)
    assert rows.tolist() == [1, 4, 8]
    assert rows.dtype == np.int64


def test_all_outside_pairs_make_it_everything() -> None:
    assert rows_of(COARSE, cluster=1, outside_share=1.0, random_seed=0).tolist() == list(range(10))


@given(
    coarse=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_own_pairs_are_all_there_and_the_share_is_of_the_outside(coarse: list[int], share: float, seed: int) -> None:
    assigned = np.array(coarse, dtype=np.int32)
    rows = rows_of(assigned, cluster=coarse[0], outside_share=share, random_seed=seed)
    inside = assigned[rows] == coarse[0]
    assert inside.sum() == (assigned == coarse[0]).sum()
    assert (~inside).sum() == round(share * (assigned != coarse[0]).sum())
    assert (np.diff(rows) > 0).all()
    assert (rows == rows_of(assigned, cluster=coarse[0], outside_share=share, random_seed=seed)).all()


def test_seed_and_cluster_change_the_sample() -> None:
    coarse = np.repeat(np.arange(3, dtype=np.int32), 100)

    def outside(cluster: int, seed: int) -> set[int]:
        rows = rows_of(coarse, cluster, 0.2, seed)
        return set(rows[coarse[rows] == 2].tolist())

    assert outside(0, seed=0) != outside(0, seed=1)
    assert outside(0, seed=0) != outside(1, seed=0)


def test_an_empty_cluster_is_refused() -> None:
    with pytest.raises(ModeError, match="cluster 7 has no pairs"):
        rows_of(COARSE, cluster=7, outside_share=0.1, random_seed=0)


@given(coarse=st.lists(st.integers(0, 2), min_size=1, max_size=40), blocks=st.integers(1, 9))
def test_blocks_make_no_difference(coarse: list[int], blocks: int) -> None:
    assigned = np.array(coarse, np.int32)
    whole = rows_of(assigned, coarse[0], 0.5, 1, blocks=1)
    assert (rows_of(assigned, coarse[0], 0.5, 1, blocks) == whole).all()


def test_held_out_images_are_as_many_as_asked_for_and_depend_on_the_seed() -> None:
    images = np.arange(500)
    assert [int(is_held_out(images, count, 500, 0).sum()) for count in (0, 1, 499)] == [0, 1, 499]
    assert (is_held_out(images, 20, 500, 1) == is_held_out(images, 20, 500, 1)).all()
    assert (is_held_out(images, 20, 500, 1) != is_held_out(images, 20, 500, 2)).any()
    assert (is_held_out(images[::-7], 20, 500, 1) == is_held_out(images, 20, 500, 1)[::-7]).all()


@pytest.fixture
def index(index_of: Callable[..., PairIndex], texts: Callable[..., Any]) -> PairIndex:
    """Thirty images with one to four captions, 75 pairs."""
    captions = [[f"{image} {number}" for number in range(1 + image % 4)] for image in range(30)]
    return index_of({"0.tar": [member for image, each in enumerate(captions) for member in texts(f"{image:02}", each)]})


@pytest.mark.parametrize("held_out", [0, 7, 29])
@pytest.mark.parametrize("block", [1, 4, 1_000])
def test_pairs_in_files_are_those_of_a_look_at_all(index: PairIndex, tmp_path: Path, held_out: int, block: int) -> None:
    rows = np.random.default_rng(0).permutation(len(index))[:50]
    rows.sort()
    parts = [rows[start : start + block] for start in range(0, len(rows), block)]
    write_pairs(tmp_path / "pairs", index, parts, held_out, random_seed=3)
    pairs = Pairs.open(tmp_path / "pairs")

    image = index.image[:]
    mask = is_held_out(image[rows], held_out, index.images, 3)
    assert pairs.rows[:].tolist() == rows[~mask].tolist()
    assert pairs.held_out[:].tolist() == rows[mask].tolist()
    _, first = np.unique(image[rows[~mask]], return_index=True)
    assert pairs.first[:].tolist() == [*first, len(pairs)]
    assert pairs.images == len(first)
    assert [*pairs.factors] == ([(pairs.images, 1.0)] if pairs.images else [])

    known = Pairs.of(rows[~mask], image)
    assert (known.rows.tolist(), known.first.tolist()) == (pairs.rows[:].tolist(), pairs.first[:].tolist())  # type: ignore[union-attr]


def test_factors_are_those_of_the_files_of_the_images(tmp_path: Path, two_sets: PairIndex) -> None:
    index = two_sets
    for number, (rows, factors) in enumerate(
        [([0, 1, 2, 3, 4], [(2, 1.0), (2, 2.5)]), ([2, 4], [(1, 1.0), (1, 2.5)]), ([3], [(1, 2.5)])]
    ):
        write_pairs(tmp_path / f"{number}", index, iter(np.array_split(rows, 2)), 0, random_seed=0)
        assert [*Pairs.open(tmp_path / f"{number}").factors] == factors


def test_the_same_pairs_have_the_same_digest_and_others_have_not(index: PairIndex, tmp_path: Path) -> None:
    rows = np.arange(len(index))
    chosen = {"all": (rows, 0), "in parts": (rows, 0), "fewer": (rows[1:], 0), "held out": (rows, 3)}
    for name, (some, held_out) in chosen.items():
        blocks = np.array_split(some, 5 if name == "in parts" else 1)
        write_pairs(tmp_path / name, index, blocks, held_out, random_seed=0)
    digests = {name: Pairs.open(tmp_path / name).digest for name in chosen}
    assert digests["all"] == digests["in parts"]
    assert len({*digests.values()}) == 3


def test_pairs_that_were_held_out_before_are_beside(index: PairIndex, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", index, every_row(20), 0, 0, beside=[np.arange(20, 23), np.arange(23, 25)])
    pairs = Pairs.open(tmp_path / "pairs")
    assert pairs.rows[:].tolist() == [*range(20)]
    assert pairs.held_out[:].tolist() == [*range(20, 25)]
    write_pairs(tmp_path / "others", index, every_row(20), 0, 0)
    assert Pairs.open(tmp_path / "others").digest != pairs.digest


def test_all_images_held_out(index: PairIndex, tmp_path: Path) -> None:
    with pytest.raises(ModeError, match="held_out: 30 of 30 images"):
        write_pairs(tmp_path / "pairs", index, every_row(len(index)), 30, 0)
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize("name", ["rows.npy", "first.npy", "held_out.npy", "factors.json"])
def test_files_that_were_cut_are_refused_in_one_line(index: PairIndex, tmp_path: Path, name: str) -> None:
    write_pairs(tmp_path / "pairs", index, every_row(len(index)), 3, 0)
    file = tmp_path / "pairs" / name
    for content in (file.read_bytes()[:-1], b""):
        file.write_bytes(content)
        with pytest.raises(ModeError, match="damaged") as raised:
            Pairs.open(tmp_path / "pairs")
        assert "\n" not in str(raised.value)
    file.unlink()
    with pytest.raises(ModeError):
        Pairs.open(tmp_path / "pairs")


@given(images=st.lists(st.integers(0, 11), min_size=12, max_size=40), count=st.integers(0, 12), seed=st.integers(0, 5))
def test_held_out_pairs_are_one_of_each_image(images: list[int], count: int, seed: int) -> None:
    image = np.sort(np.array([*range(12), *images]))
    left = np.flatnonzero(is_held_out(image, 6, 12, seed))
    pairs = Pairs(left[:0], left[:0], left, [], "")
    drawn = held_out_pairs(pairs, image, count, seed)
    assert {*drawn} <= {*left}
    assert len(drawn) == len({*image[drawn].tolist()}) == min(count, 6)
    assert {*drawn} <= {*held_out_pairs(pairs, image, count + 1, seed)}


@given(rows=st.sets(st.integers(0, 99), min_size=1), number=st.integers(0, 120), cut=st.integers(0, 99))
def test_some_rows_are_so_many_whatever_the_blocks(rows: set[int], number: int, cut: int) -> None:
    given = np.array(sorted(rows), np.int64)
    drawn = np.concatenate([*some_rows(lambda: [given[:cut], given[cut:]], number, random_seed=3)])
    assert len(drawn) == min(number, len(rows))
    assert drawn.tolist() == sorted(rows.intersection(drawn.tolist()))
    np.testing.assert_array_equal(drawn, np.concatenate([*some_rows(lambda: [given], number, random_seed=3)]))
