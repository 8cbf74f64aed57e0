"""Metrics: pure functions of score arrays, of no model, file or device.

Scores are read along rows: `scores[i, j]` says how well column j fits row i, higher is better. A *rank* counts from 0,
the best. Equal scores rank in the order of their columns, so that a model that gives every class the same score is
right only about class 0 (never about everything), and the same scores always give the same figure.

The worked case of the docstrings, 2 images (rows) by 4 classes (columns), correct classes 2 and 0:

                 class 0   1     2     3
    image 0        0.1   0.9   0.5   0.2     class 2 is second: rank 1
    image 1        0.8   0.3   0.0   0.6     class 0 is first:  rank 0
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating]
Ranks = NDArray[np.int64]


def ranks(scores: Scores, targets: NDArray[np.integer]) -> Ranks:
    """Rank of the right column in every row, int64 [rows].

    Args:
        scores: [rows, columns], finite.
        targets: [rows]: the right column.

    Raises:
        ValueError: a score is NaN or infinite; every comparison with NaN is false, which would pass for rank 0.

    Example:
        >>> ranks(np.array([[0.1, 0.9, 0.5, 0.2], [0.8, 0.3, 0.0, 0.6]]), np.array([2, 0]))
        array([1, 0])
    """
    _check_finite(scores)
    right = np.take_along_axis(scores, targets[:, None], axis=1)
    earlier = np.arange(scores.shape[1])[None, :] < targets[:, None]
    return np.asarray((scores > right).sum(axis=1) + ((scores == right) & earlier).sum(axis=1), np.int64)


def best_ranks(scores: Scores, owners: NDArray[np.integer], first_row: int = 0) -> Ranks:
    """Rank of the best of several right columns in every row, int64 [rows]: an image and its captions.

    Args:
        scores: [rows, columns], finite.
        owners: [columns]: the row that a column belongs to. Every row owns at least one.
        first_row: number of the first of these rows, where they are a block of more.

    Raises:
        ValueError: a score is NaN or infinite.

    Example:
        Two images by four captions, of which each image has two, captions 0 and 1 belonging to image 0. Image 0's best
        own caption is its first in rank; image 1's are behind two captions of the other.

        >>> best_ranks(np.array([[0.1, 0.9, 0.5, 0.2], [0.8, 0.7, 0.0, 0.6]]), np.array([0, 0, 1, 1]))
        array([0, 2])
    """
    rows = np.arange(first_row, first_row + len(scores))
    own = np.where(owners[None, :] == rows[:, None], scores, -np.inf)
    return ranks(scores, own.argmax(axis=1))


def accuracy(found: Ranks, k: int = 1) -> float:
    """Share of rows whose right column is among the best k; for retrieval the same is recall@k.

    >>> accuracy(np.array([1, 0]), k=1), accuracy(np.array([1, 0]), k=2)
    (0.5, 1.0)
    """
    return float((found < k).mean())


def mean_per_class_recall(found: Ranks, targets: NDArray[np.integer]) -> float:
    """Top-1 accuracy of each class, averaged over the classes that occur in `targets` (balanced accuracy).

    Example:
        Class 0 is recognised in one of two images, class 2 in its only one: (1/2 + 1) / 2.

        >>> mean_per_class_recall(np.array([0, 3, 0]), np.array([0, 0, 2]))
        0.75
    """
    images = np.bincount(targets)
    recognised = np.bincount(targets, weights=found == 0)
    occurring = images > 0
    return float((recognised[occurring] / images[occurring]).mean())


def roc_auc(scores: Scores, targets: NDArray[np.integer]) -> float:
    """Area under the ROC curve of a two-class task: how often class 1's images get a higher margin than class 0's.

    The margin is the score of class 1 minus that of class 0; a softmax over the two with any temperature has the same
    order. Equal margins count one half. Both classes have to occur in `targets`.

    Example:
        Margins -0.2 and 0.3 of class 0, 0.1 and 0.5 of class 1: three of the four pairs are in order.

        >>> roc_auc(np.array([[0.5, 0.3], [0.1, 0.4], [0.0, 0.1], [0.2, 0.7]]), np.array([0, 0, 1, 1]))
        0.75
    """
    from sklearn.metrics import roc_auc_score  # few tasks need it, and importing it takes most of a second

    _check_finite(scores)
    return float(roc_auc_score(targets, scores[:, 1] - scores[:, 0]))


def _check_finite(scores: Scores) -> None:
    if not np.isfinite(scores).all():
        raise ValueError("scores have a NaN or an infinite value")
