"""Balanced k-means: capacity, quality beside an unbalanced fit, duplicates and other edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from mode.clustering.kmeans import balanced_kmeans, capacity_of, nth_regret, place
from mode.clustering.rows import Rows


def blobs(sizes: list[int], dimensions: int = 6, seed: int = 0, spread: float = 0.05) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((len(sizes), dimensions))
    points = np.repeat(centres, sizes, axis=0)
    return (points + spread * random.standard_normal(points.shape)).astype(np.float32)


def inertia_of(points: np.ndarray, labels: np.ndarray) -> float:
    return sum(
        float(np.square(points[labels == c] - points[labels == c].mean(axis=0)).sum()) for c in np.unique(labels)
    )


def test_capacity_by_hand():
    assert capacity_of(100, 10, 1.1) == 11
    assert capacity_of(10, 10, 1.9) == 1
    # 1.1 x 2.5 would round down to room for 8 of 10 points.
    assert capacity_of(10, 4, 1.1) == 3


def test_equal_blobs_are_found():
    points = blobs([30, 30, 30, 30])
    fit = balanced_kmeans(Rows(points), 4, balance=1.1, iterations=20, random_seed=0, restarts=4)
    truth = np.repeat(np.arange(4), 30)
    assert len({(a, b) for a, b in zip(fit.labels, truth, strict=True)}) == 4
    assert fit.sizes.tolist() == [30] * 4


@settings(max_examples=60)
@given(
    points=st.integers(1, 90),
    clusters=st.integers(1, 12),
    distinct=st.integers(1, 90),
    balance=st.sampled_from([1.0, 1.1, 1.5, 3.0]),
    seed=st.integers(0, 5),
)
def test_every_fit_keeps_its_promises(points, clusters, distinct, balance, seed):
    if clusters > points:
        return
    random = np.random.default_rng(seed)
    values = random.standard_normal((distinct, 3)).astype(np.float32)
    vectors = values[random.integers(0, distinct, points)]
    fit = balanced_kmeans(Rows(vectors), clusters, balance, iterations=10, random_seed=seed)

    assert fit.sizes.sum() == points
    assert fit.sizes.min() >= 1
    assert fit.sizes.max() <= capacity_of(points, clusters, balance)
    assert np.array_equal(np.bincount(fit.labels, minlength=clusters), fit.sizes)
    for cluster in range(clusters):
        np.testing.assert_allclose(fit.centres[cluster], vectors[fit.labels == cluster].mean(axis=0), atol=1e-5)
    assert fit.inertia == pytest.approx(inertia_of(vectors, fit.labels), abs=1e-3)


def test_balance_costs_little_on_data_without_lumps():
    points = np.random.default_rng(0).standard_normal((4000, 8)).astype(np.float32)
    fit = balanced_kmeans(Rows(points), 32, balance=1.1, iterations=20, random_seed=0)
    free = KMeans(32, init="random", n_init=1, max_iter=20, random_state=0).fit(points)
    assert np.bincount(free.labels_).max() / (4000 / 32) > 1.1
    assert fit.sizes.max() / (4000 / 32) <= 1.1
    assert fit.inertia <= 1.03 * free.inertia_


def test_prices_find_clusters_of_equal_size_that_are_nearly_as_tight():
    """Plain k-means of a normal distribution has large clusters in the middle and small ones outside."""
    points = np.random.default_rng(0).standard_normal((2000, 2)).astype(np.float32)
    fit = balanced_kmeans(Rows(points), 16, balance=1.0, iterations=20, random_seed=0, restarts=4)
    free = KMeans(16, n_init=1, random_state=0).fit(points)
    assert fit.sizes.tolist() == [125] * 16
    assert fit.inertia <= 1.25 * free.inertia_  # without prices, with what is left above the capacity moved: 1.8


def test_large_blob_gets_several_centres():
    points = blobs([400, 50, 50])
    fit = balanced_kmeans(Rows(points), 10, balance=1.1, iterations=20, random_seed=1)
    truth = np.repeat([0, 1, 2], [400, 50, 50])
    pure = sum(np.bincount(truth[fit.labels == cluster]).max() for cluster in range(10))
    assert pure / 500 >= 0.95


def test_many_equal_points_fill_clusters_of_their_own():
    random = np.random.default_rng(0)
    others = random.standard_normal((600, 5)).astype(np.float32)
    same = np.full((400, 5), 0.3, dtype=np.float32)
    points = np.concatenate([same, others])[random.permutation(1000)]
    fit = balanced_kmeans(Rows(points), 20, balance=1.1, iterations=20, random_seed=0)
    is_same = (points == np.float32(0.3)).all(axis=1)
    own = [c for c in range(20) if is_same[fit.labels == c].all()]
    assert len(own) == 8  # 400 points, 50 in each
    assert fit.sizes.max() <= 55


def test_all_points_equal():
    fit = balanced_kmeans(Rows(np.zeros((1001, 4), np.float32)), 10, balance=1.1, iterations=20, random_seed=0)
    assert fit.sizes.max() <= 110
    assert fit.sizes.min() >= 1
    assert fit.inertia == 0.0
    assert not fit.centres.any()


def test_minus_zero_equals_zero():
    points = np.zeros((100, 3), np.float32)
    points[::2] = -0.0
    fit = balanced_kmeans(Rows(points), 5, balance=1.0, iterations=5, random_seed=0)
    assert fit.sizes.tolist() == [20] * 5


def test_as_many_clusters_as_points():
    points = blobs([3, 4, 5])
    fit = balanced_kmeans(Rows(points), 12, balance=1.1, iterations=20, random_seed=0)
    assert sorted(fit.labels.tolist()) == list(range(12))
    assert fit.inertia == pytest.approx(0.0, abs=1e-5)


def test_one_cluster_is_the_mean():
    points = blobs([7, 9])
    fit = balanced_kmeans(Rows(points), 1, balance=1.1, iterations=20, random_seed=0)
    np.testing.assert_allclose(fit.centres[0], points.mean(axis=0), atol=1e-6)
    assert fit.sizes.tolist() == [16]


def test_same_seed_same_fit_and_other_seed_another():
    points = np.random.default_rng(0).standard_normal((3000, 6)).astype(np.float16)
    fits = [balanced_kmeans(Rows(points), 24, balance=1.1, iterations=10, random_seed=seed) for seed in (3, 3, 4)]
    assert np.array_equal(fits[0].labels, fits[1].labels)
    assert np.array_equal(fits[0].centres, fits[1].centres)
    assert not np.array_equal(fits[0].labels, fits[2].labels)


def test_blocks_and_memory_map_change_nothing(tmp_path):
    points = np.random.default_rng(0).uniform(-1, 1, (1000, 6)).astype(np.float16)
    np.save(tmp_path / "points.npy", points)
    whole = balanced_kmeans(Rows(points), 8, balance=1.1, iterations=8, random_seed=0)
    mapped = Rows(np.load(tmp_path / "points.npy", mmap_mode="r"), block=33)
    blockwise = balanced_kmeans(mapped, 8, balance=1.1, iterations=8, random_seed=0)
    assert np.mean(whole.labels == blockwise.labels) > 0.99
    np.testing.assert_allclose(whole.centres, blockwise.centres, atol=1e-2)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**31))
def test_nth_regret_is_that_of_a_sorted_list(points, clusters, seed):
    random = np.random.default_rng(seed)
    labels = random.integers(0, clusters, points).astype(np.int32)
    regret = random.choice(np.array([0.0, -0.0, 1e-30, 0.5, 2.0, 3e20], np.float32), points)
    nth = random.normal(0, 4, clusters)
    found = nth_regret(labels, regret, nth)
    for cluster in range(clusters):
        given_for_it = sorted(regret[labels == cluster])
        place = int(np.clip(np.ceil(nth[cluster]), 1, max(1, len(given_for_it)))) - 1
        assert found[cluster] == (given_for_it[place] if given_for_it else 0)


def test_place_fills_rooms_cheapest_first():
    costs = np.array([[1.0, 9.0], [0.5, 2.0], [3.0, 4.0]])
    candidates = np.array([[0, 1], [0, 1], [1, 0]])
    room = np.array([1, 1])
    # Point 1 takes the room in 0 before point 0; point 2 takes the only one in 1, so that nothing is left for point 0.
    assert place(costs, candidates, room).tolist() == [-1, 0, 1]
    assert room.tolist() == [0, 0]
