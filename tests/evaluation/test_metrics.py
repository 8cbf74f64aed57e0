"""Metrics against results worked by hand, a naive oracle, and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from mode.evaluation import metrics

#: 2 images x 4 classes, of the module's docstring; the right classes are 2 and 0.
SCORES = np.array([[0.1, 0.9, 0.5, 0.2], [0.8, 0.3, 0.0, 0.6]])


class TestRanks:
    def test_by_hand(self) -> None:
        np.testing.assert_array_equal(metrics.ranks(SCORES, np.array([2, 0])), [1, 0])
        np.testing.assert_array_equal(metrics.ranks(SCORES, np.array([0, 2])), [3, 3])

    def test_equal_scores_rank_in_the_order_of_their_columns(self) -> None:
        """A model without an opinion is right about class 0 only, as argmax has it; never about everything."""
        np.testing.assert_array_equal(metrics.ranks(np.zeros((4, 4)), np.arange(4)), [0, 1, 2, 3])

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_a_score_that_is_no_number_is_refused(self, bad: float) -> None:
        scores = SCORES.copy()
        scores[1, 2] = bad
        with pytest.raises(ValueError, match="NaN"):
            metrics.ranks(scores, np.array([2, 0]))

    def test_no_rows(self) -> None:
        assert metrics.ranks(np.empty((0, 4)), np.empty(0, np.int64)).shape == (0,)

    @given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 8))
    def test_equals_a_stable_sort(self, seed: int, rows: int, columns: int) -> None:
        random = np.random.default_rng(seed)
        scores = random.integers(0, 4, size=(rows, columns)).astype(np.float32)  # many ties
        targets = random.integers(0, columns, rows)
        order = np.argsort(-scores, axis=1, kind="stable")
        naive = [list(order[row]).index(targets[row]) for row in range(rows)]
        np.testing.assert_array_equal(metrics.ranks(scores, targets), naive)


class TestBestRanks:
    def test_by_hand(self) -> None:
        """Captions 0 and 1 belong to image 0, 2 and 3 to image 1."""
        scores = np.array([[0.1, 0.9, 0.5, 0.2], [0.8, 0.7, 0.0, 0.6]])
        np.testing.assert_array_equal(metrics.best_ranks(scores, np.array([0, 0, 1, 1])), [0, 2])

    def test_a_block_of_rows_equals_the_whole(self) -> None:
        random = np.random.default_rng(0)
        owners = np.repeat(np.arange(7), [1, 3, 2, 5, 1, 1, 4])
        scores = random.normal(size=(7, len(owners)))
        whole = metrics.best_ranks(scores, owners)
        parts = [metrics.best_ranks(scores[start : start + 3], owners, start) for start in (0, 3, 6)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)

    @given(st.integers(0, 2**32 - 1), st.integers(1, 6))
    def test_equals_counting_foreign_captions_before_the_best_own(self, seed: int, images: int) -> None:
        random = np.random.default_rng(seed)
        owners = np.repeat(np.arange(images), random.integers(1, 5, images))
        scores = random.permutation(images * len(owners)).reshape(images, len(owners)) / 7.0  # no ties
        found = metrics.best_ranks(scores, owners)
        for image in range(images):
            best = scores[image, owners == image].max()
            assert found[image] == (scores[image, owners != image] > best).sum()


class TestAccuracy:
    def test_by_hand(self) -> None:
        found = np.array([0, 1, 4, 5, 0])
        assert metrics.accuracy(found, 1) == 0.4
        assert metrics.accuracy(found, 5) == 0.8
        assert metrics.accuracy(found, 6) == 1.0

    @given(st.integers(0, 2**32 - 1), st.integers(1, 6))
    def test_equals_scikit_learn(self, seed: int, k: int) -> None:
        random = np.random.default_rng(seed)
        scores, targets = random.random((20, 7)), random.integers(0, 7, 20)
        expected = top_k_accuracy_score(targets, scores, k=k, labels=np.arange(7))
        assert metrics.accuracy(metrics.ranks(scores, targets), k) == pytest.approx(expected)


class TestMeanPerClassRecall:
    def test_by_hand(self) -> None:
        """Class 0: 1 of 3, class 1: none of 1, class 3: 2 of 2; class 2 has no image and does not count."""
        targets = np.array([0, 0, 0, 1, 3, 3])
        found = np.array([0, 1, 2, 1, 0, 0])
        assert metrics.mean_per_class_recall(found, targets) == pytest.approx((1 / 3 + 0 + 1) / 3)

    @given(st.integers(0, 2**32 - 1))
    def test_equals_balanced_accuracy(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        scores = random.random((30, 4))
        targets = np.concatenate([np.arange(4), random.integers(0, 4, 26)])
        expected = balanced_accuracy_score(targets, scores.argmax(axis=1))
        assert metrics.mean_per_class_recall(metrics.ranks(scores, targets), targets) == pytest.approx(expected)


class TestRocAuc:
    def test_by_hand(self) -> None:
        """Margins 0.1 and 0.4 of class 0, 0.3 and 0.4 of class 1: 0.1 < 0.3, 0.1 < 0.4, 0.4 > 0.3, 0.4 = 0.4."""
        scores = np.array([[0.0, 0.125], [0.0, 0.5], [0.0, 0.25], [0.25, 0.75]])
        assert metrics.roc_auc(scores, np.array([0, 0, 1, 1])) == pytest.approx((1 + 1 + 0 + 0.5) / 4)

    def test_is_about_the_margin_not_the_score_of_class_one(self) -> None:
        scores = np.array([[0.9, 0.8], [0.1, 0.2]])
        assert metrics.roc_auc(scores, np.array([0, 1])) == 1.0

    def test_a_score_that_is_no_number_is_refused(self) -> None:
        with pytest.raises(ValueError, match="NaN"):
            metrics.roc_auc(np.array([[0.0, np.nan], [0.0, 1.0]]), np.array([0, 1]))
