"""Words that name clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from mode.clustering.hierarchy import Clusters
from mode.clustering.words import class_tf_idf, name_clusters
from mode.errors import ModeError


class Captions:
    """What `name_clusters` needs of an index."""

    def __init__(self, captions: list[str]) -> None:
        self._captions = captions

    def __len__(self) -> int:
        return len(self._captions)

    def captions(self, rows: np.ndarray) -> list[str]:
        return [self._captions[row] for row in rows]


def three_fine_clusters() -> Clusters:
    return Clusters(
        fine_centres=np.eye(3, dtype=np.float32),
        coarse_of_fine=np.array([0, 0, 1], np.int32),
        coarse_centres=np.array([[0.5, 0.5, 0], [0, 0, 1]], np.float32),
        fine_sizes=np.array([2, 2, 2]),
        coarse_sizes=np.array([4, 2]),
        strategy="two-level",
        random_seed=0,
    )


def vectors_in(fine: list[int]) -> np.ndarray:
    """Vectors that each lie nearest to the centre of one fine cluster."""
    vectors: np.ndarray = 0.9 * np.eye(3, dtype=np.float32)[fine]
    return vectors


def test_class_tf_idf_by_hand():
    counts = csr_matrix(np.array([[2.0, 2.0, 0.0], [0.0, 1.0, 1.0]]))
    # Four and two words: three in the mean. Word 1 occurs three times in all.
    expected = [
        [0.5 * math.log(1 + 3 / 2), 0.5 * math.log(1 + 3 / 3), 0.0],
        [0.0, 0.5 * math.log(1 + 3 / 3), 0.5 * math.log(1 + 3 / 1)],
    ]
    np.testing.assert_allclose(class_tf_idf(counts).toarray(), expected, rtol=1e-6)


def test_clusters_are_named_by_what_only_they_say():
    captions = ["the red dog", "a red dog", "the red cat", "the red cat", "a blue shoe", "some blue shoe"]
    named = name_clusters(three_fine_clusters(), Captions(captions), vectors_in([0, 0, 1, 1, 2, 2]), words=2)
    assert named.fine_words == [["dog", "red"], ["cat", "red"], ["blue", "shoe"]]
    assert named.coarse_words == [["red", "cat"], ["blue", "shoe"]]


def test_cluster_without_captions_or_words_has_no_name():
    named = name_clusters(three_fine_clusters(), Captions(["the dog", "a dog", "of the"]), vectors_in([0, 0, 1]))
    assert named.fine_words == [["dog"], [], []]
    nameless = name_clusters(three_fine_clusters(), Captions(["the", "a"]), vectors_in([0, 1]))
    assert nameless.fine_words == [[], [], []]
    assert nameless.coarse_words == [[], []]


def test_vectors_of_other_pairs_is_refused():
    with pytest.raises(ModeError, match="1 vectors, 2 pairs in the index"):
        name_clusters(three_fine_clusters(), Captions(["a", "b"]), vectors_in([0]))
