"""Two levels of clusters, and the strategies beside it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from mode.clustering.assignment import assign
from mode.clustering.hierarchy import Clusters, fit_clusters, nearest_centres
from mode.clustering.targets import near_phrases
from mode.embedding.lsa import LsaEmbedder
from mode.errors import ModeError
from mode.params import ClusteringParams


def topics(per_fine: int = 25, coarse: int = 3, fine_each: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around fine topics that lie around coarse ones, and the coarse topic of each."""
    random = np.random.default_rng(seed)
    centres = np.repeat(random.standard_normal((coarse, 16)), fine_each, axis=0)
    centres = centres + 0.3 * random.standard_normal(centres.shape)
    vectors = np.repeat(centres, per_fine, axis=0)
    vectors = vectors + 0.05 * random.standard_normal(vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16), np.repeat(np.arange(coarse), fine_each * per_fine)


def test_two_levels_find_the_topics():
    vectors, truth = topics()
    clusters = fit_clusters(vectors, ClusteringParams(), fine=12, coarse=3, random_seed=0)
    found = assign(vectors, clusters)
    assert all(len(np.unique(truth[found.coarse == c])) == 1 for c in range(3))
    assert clusters.fine_sizes.max() <= 1.1 * 25
    assert np.bincount(clusters.coarse_of_fine).tolist() == [4, 4, 4]
    for c in range(3):
        assert clusters.condition(c).shape == (4, 16)
        np.testing.assert_allclose(clusters.coarse_centres[c], clusters.condition(c).mean(axis=0), rtol=1e-5)
        assert clusters.coarse_sizes[c] == clusters.fine_sizes[clusters.coarse_of_fine == c].sum()


def test_numbered_by_coarse_cluster_and_size():
    vectors = np.random.default_rng(0).standard_normal((500, 5)).astype(np.float32)
    clusters = fit_clusters(vectors, ClusteringParams(), fine=20, coarse=4, random_seed=0)
    assert (np.diff(clusters.coarse_sizes) <= 0).all()
    assert (np.diff(clusters.coarse_of_fine) >= 0).all()
    for c in range(4):
        assert (np.diff(clusters.fine_sizes[clusters.coarse_of_fine == c]) <= 0).all()
    assert clusters.statistics["points"] == clusters.statistics["points_given"] == 500
    assert clusters.statistics["imbalance"] == clusters.fine_sizes.max() / 25
    assert clusters.statistics["empty"] == clusters.statistics["duplicate_centres"] == 0


def test_one_step_goes_straight_into_coarse_clusters():
    vectors, truth = topics(fine_each=1, per_fine=40)
    clusters = fit_clusters(vectors, ClusteringParams(strategy="one-step"), fine=12, coarse=3, random_seed=0)
    assert (clusters.fine, clusters.coarse) == (3, 3)
    found = assign(vectors, clusters)
    assert np.array_equal(found.fine, found.coarse)
    assert all(len(np.unique(truth[found.coarse == c])) == 1 for c in range(3))


def test_random_centres_are_the_means_of_the_assigned():
    vectors, _ = topics()
    clusters = fit_clusters(vectors, ClusteringParams(strategy="random"), fine=12, coarse=3, random_seed=7)
    found = assign(vectors, clusters)
    assert np.bincount(found.coarse).tolist() == clusters.coarse_sizes.tolist()
    for c in range(3):
        means = vectors[found.coarse == c].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(clusters.condition(c)[0], means, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_targets_and_the_rest(count):
    """Cluster 0 is the fine clusters nearest to any target, even if it is the smaller one; against a loop."""
    vectors, _ = topics()
    points = vectors[[0, 3, 299]].astype(np.float32)
    params = ClusteringParams(strategy="targets", targets=["a"], coarse=2)
    near = partial(nearest_centres, points, count=count)
    clusters = fit_clusters(vectors, params, fine=12, coarse=2, random_seed=0, near_targets=near)
    plain = fit_clusters(vectors, ClusteringParams(), fine=12, coarse=3, random_seed=0)
    assert sorted(map(tuple, clusters.fine_centres)) == sorted(map(tuple, plain.fine_centres))
    wanted = set()
    for point in points:
        order = sorted(range(12), key=lambda c: np.linalg.norm(point - clusters.fine_centres[c]))
        wanted |= set(order[:count])
    assert set(np.flatnonzero(clusters.coarse_of_fine == 0)) == wanted
    assert clusters.coarse == 2
    assert clusters.coarse_sizes.tolist() == [
        clusters.fine_sizes[list(wanted)].sum(),
        300 - clusters.fine_sizes[list(wanted)].sum(),
    ]
    assert clusters.condition(0).shape == (len(wanted), 16)
    found = assign(vectors, clusters)
    assert np.array_equal(found.coarse == 0, np.isin(found.fine, list(wanted)))


def test_targets_that_are_near_everything():
    vectors, _ = topics()
    params = ClusteringParams(strategy="targets", targets=["a"], coarse=2)
    near = partial(nearest_centres, vectors[:1], count=12)
    with pytest.raises(ModeError, match="all 12 fine clusters are near a target"):
        fit_clusters(vectors, params, fine=12, coarse=2, random_seed=0, near_targets=near)


@pytest.mark.parametrize("view", ["text", "both"])
def test_phrases_are_compared_with_the_texts_part_of_the_centres(view, capsys):
    captions = ["a red dog", "a blue dog", "red shoes", "blue shoes", "a red saw", "a blue saw"]
    embedder = LsaEmbedder.fit(captions, 5, 0)
    embedder.view = view  # of LSA there is no other, but what follows asks for no more than this
    texts = embedder.encode(captions)
    centres = texts if view == "text" else np.hstack([texts, texts[::-1]]) / np.float32(np.sqrt(2))
    near = near_phrases(embedder, ["blue saw", "blue shoes", "zyxgfq"], 1)
    assert near(centres).tolist() == [3, 5]
    assert capsys.readouterr().out == "1 of 3 targets have no known word: zyxgfq\n"
    with pytest.raises(ModeError, match=r"clustering.targets: embedder 'lsa' knows no word of zyxgfq, qqq"):
        near_phrases(embedder, ["zyxgfq", "qqq"], 1)


@pytest.mark.parametrize("strategy", ["two-level", "one-step", "random"])
def test_fitted_on_a_sample_and_repeatable(tmp_path, strategy):
    vectors = np.random.default_rng(0).uniform(-1, 1, (700, 5)).astype(np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    params = ClusteringParams(strategy=strategy, sample=300)
    first, second = (fit_clusters(source, params, fine=10, coarse=2, random_seed=1) for source in (vectors, mapped))
    assert first.statistics["points"] == 300
    assert first.statistics["points_given"] == 700
    assert first.fine_sizes.sum() == 300
    assert np.array_equal(first.fine_centres, second.fine_centres)
    assert np.array_equal(first.coarse_of_fine, second.coarse_of_fine)


def test_duplicate_captions_give_duplicate_centres_and_are_counted():
    vectors = np.concatenate(
        [np.tile(np.eye(4, dtype=np.float32)[0], (60, 1)), topics()[0][:60, :4].astype(np.float32)]
    )
    clusters = fit_clusters(vectors, ClusteringParams(), fine=8, coarse=2, random_seed=0)
    assert clusters.statistics["duplicate_centres"] == 3  # 60 of 120 points fill four clusters of 15
    assert clusters.fine_sizes.max() <= 16


@pytest.mark.parametrize(
    ("pairs", "fine", "coarse", "message"),
    [
        (3, 4, 2, "4 clusters of 3 pairs"),
        (0, 1, 1, "1 clusters of 0 pairs"),
        (9, 2, 3, "3 coarse clusters of 2 fine"),
    ],
)
def test_impossible_numbers_are_refused(pairs, fine, coarse, message):
    with pytest.raises(ModeError, match=message):
        fit_clusters(np.zeros((pairs, 2), np.float32), ClusteringParams(), fine, coarse, random_seed=0)


def test_smallest_of_all():
    clusters = fit_clusters(np.ones((1, 2), np.float32), ClusteringParams(), fine=1, coarse=1, random_seed=0)
    assert clusters.fine_centres.tolist() == [[1, 1]]


def test_condition_of_a_cluster_that_is_not_there():
    clusters = fit_clusters(topics()[0], ClusteringParams(), fine=4, coarse=2, random_seed=0)
    with pytest.raises(ModeError, match="coarse cluster 2: there are 2"):
        clusters.condition(2)


def test_saved_and_loaded(tmp_path):
    clusters = fit_clusters(topics()[0], ClusteringParams(), fine=6, coarse=2, random_seed=0)
    clusters.save(tmp_path / "clusters")
    again = Clusters.load(tmp_path / "clusters")
    for name in ("fine_centres", "coarse_of_fine", "coarse_centres", "fine_sizes", "coarse_sizes"):
        assert np.array_equal(getattr(again, name), getattr(clusters, name))
    assert (again.strategy, again.random_seed, again.statistics) == (
        clusters.strategy,
        clusters.random_seed,
        clusters.statistics,
    )
    with pytest.raises(ModeError, match="no clusters there"):
        Clusters.load(tmp_path / "elsewhere")
