"""Nearest fine centre: equal to a full distance matrix, whatever the block."""

from __future__ import annotations

import numpy as np
import pytest

from mode.clustering.assignment import Assignment, assign
from mode.clustering.hierarchy import Clusters, random_clusters
from mode.clustering.rows import NearestCentre, Rows
from mode.errors import ModeError


def clusters_of(centres: np.ndarray, coarse_of_fine: np.ndarray, strategy: str = "two-level") -> Clusters:
    coarse = int(coarse_of_fine.max()) + 1
    return Clusters(
        fine_centres=centres,
        coarse_of_fine=coarse_of_fine.astype(np.int32),
        coarse_centres=np.stack([centres[coarse_of_fine == c].mean(axis=0) for c in range(coarse)]),
        fine_sizes=np.ones(len(centres), np.int64),
        coarse_sizes=np.ones(coarse, np.int64),
        strategy=strategy,
        random_seed=5,
    )


def full_matrix(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Naive oracle: every distance in float64."""
    difference = vectors.astype(np.float64)[:, None, :] - centres.astype(np.float64)[None, :, :]
    return np.sqrt(np.square(difference).sum(axis=2))


BLOCK = 32


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
@pytest.mark.parametrize("fine", [1, 2, 37])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_equals_the_full_matrix(count, fine, dtype):
    random = np.random.default_rng(count + fine)
    vectors = random.standard_normal((count, 11)).astype(dtype)
    centres = random.standard_normal((fine, 11)).astype(np.float32)
    clusters = clusters_of(centres, np.arange(fine) % min(3, fine))

    found = assign(vectors, clusters, block=BLOCK)

    distances = full_matrix(vectors, centres)
    nearest = distances.argmin(axis=1) if count else np.empty(0, np.int64)
    assert np.array_equal(found.fine, nearest)
    assert np.array_equal(found.coarse, clusters.coarse_of_fine[nearest])
    np.testing.assert_allclose(found.distance, distances[np.arange(count), nearest], rtol=1e-4)
    assert (found.fine.dtype, found.coarse.dtype, found.distance.dtype) == (np.int32, np.int32, np.float32)


def test_distance_of_a_vector_on_its_centre_is_zero():
    centres = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    found = assign(np.repeat(centres, 20, axis=0), clusters_of(centres, np.zeros(5, np.int64)))
    assert np.array_equal(found.fine, np.repeat(np.arange(5), 20))
    assert not found.distance.any()


def test_zero_vector_goes_to_the_shortest_centre():
    centres = np.array([[3.0, 0.0], [0.0, 2.0]], np.float32)
    found = assign(np.zeros((2, 2), np.float32), clusters_of(centres, np.arange(2)))
    assert found.fine.tolist() == [1, 1]
    assert found.distance.tolist() == [2.0, 2.0]


def test_prices_shift_the_border():
    centres = np.array([[0.0], [1.0]], np.float32)
    rows = Rows(np.array([[0.2], [0.4], [0.6]], np.float32))
    block = rows.take(np.arange(3))
    assert NearestCentre(centres).search(block)[1][:, 0].tolist() == [0, 0, 1]
    # x^2 + 0.3 > (1 - x)^2 from x = 0.35 on; only the difference of prices counts, so 2.3 and 2 are the same.
    for prices in (np.array([0.3, 0.0]), np.array([2.3, 2.0]), np.array([0.0, -0.3])):
        assert NearestCentre(centres, prices).search(block)[1][:, 0].tolist() == [0, 1, 1]


def test_random_clusters_depend_on_row_and_seed_alone():
    rows = np.arange(40_000)
    clusters = random_clusters(rows, 4, random_seed=1)
    assert np.array_equal(clusters[123:200], random_clusters(rows[123:200], 4, random_seed=1))
    assert np.mean(clusters == random_clusters(rows, 4, random_seed=2)) == pytest.approx(0.25, abs=0.02)
    assert np.bincount(clusters) / len(rows) == pytest.approx([0.25] * 4, abs=0.02)
    assert np.mean(clusters[1:] == clusters[:-1]) == pytest.approx(0.25, abs=0.02)


def test_strategy_random_ignores_the_vectors():
    vectors = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    centres = np.zeros((3, 4), np.float32)
    found = assign(vectors, clusters_of(centres, np.arange(3), strategy="random"), block=7)
    assert np.array_equal(found.fine, random_clusters(np.arange(50), 3, random_seed=5))
    assert np.array_equal(found.coarse, found.fine)
    np.testing.assert_allclose(found.distance, np.linalg.norm(vectors, axis=1), rtol=1e-5)


def test_other_dimensions_are_refused():
    with pytest.raises(ModeError, match="vectors of 3 dimensions, centres of 2"):
        assign(np.zeros((1, 3), np.float32), clusters_of(np.zeros((1, 2), np.float32), np.zeros(1, np.int64)))


def test_saved_and_loaded(tmp_path):
    kept = Assignment(np.array([2, 0], np.int32), np.array([1, 0], np.int32), np.array([0.5, 0.25], np.float32))
    kept.save(tmp_path / "assignment.parquet")
    again = Assignment.load(tmp_path / "assignment.parquet")
    for name in ("fine", "coarse", "distance"):
        assert np.array_equal(getattr(again, name), getattr(kept, name))
        assert getattr(again, name).dtype == getattr(kept, name).dtype
    with pytest.raises(ModeError, match="no such file"):
        Assignment.load(tmp_path / "other.parquet")
