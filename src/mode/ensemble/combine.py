"""From the models' scores to the ensemble's: weights by model, the weighted sum, the weights of single queries."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from mode.clip.model import Clip
from mode.ensemble.router import Router

#: Numpy arrays or torch tensors.
Scores = TypeVar("Scores")
Weight = TypeVar("Weight", float, NDArray[np.float64])


def weighted_sum(terms: Iterable[tuple[Any, Scores]]) -> Scores:
    """Sum of weight x scores over (weight, scores), at least one, added in their order.

    >>> weighted_sum([(0.75, np.array([1.0, 0.0])), (0.25, np.array([0.0, 1.0]))])
    array([0.75, 0.25])
    """
    total: Scores = reduce(operator.add, (weight * scores for weight, scores in terms))
    return total


def combine(scores: Mapping[str, Scores], weights: Mapping[str, float]) -> Scores:
    """The ensemble's scores: the weighted sum of the models' cosine similarities.

    Similarities, not logits: the models' logit scales play no part (as in the published code).

    Args:
        scores: of every weighted model, all of one shape (arrays or torch tensors).
        weights: one per model; a model of weight 0 needs no scores.

    Example:
        >>> combine({"a": np.array([1.0, 0.0]), "b": np.array([0.0, 1.0])}, {"a": 0.75, "b": 0.25, "c": 0.0})
        array([0.75, 0.25])
    """
    return weighted_sum((weight, scores[name]) for name, weight in weights.items() if weight)


def by_model(members: Mapping[str, str], routed: Mapping[str, Weight]) -> dict[str, Weight]:
    """Weights by model from weights by expert: a model that stands in for several experts has the sum of theirs.

    Args:
        members: expert -> the model that answers for it.
        routed: expert -> its weight.

    Example:
        >>> by_model({"a": "seed", "b": "b", "c": "seed"}, {"a": 0.25, "b": 0.5, "c": 0.25})
        {'seed': 0.5, 'b': 0.5}
    """
    weights: dict[str, Weight] = {}
    for expert, model in members.items():
        weights[model] = weights[model] + routed[expert] if model in weights else routed[expert]
    return weights


@dataclass(frozen=True)
class QueryWeights:
    """Weights of every query of a retrieval task by itself.

    A text has p(expert | text). What an image is about is not known before it is searched for, so it is guessed first,
    with the weights of the task as a whole::

        p(expert | image) = sum over texts of p(text | image) p(expert | text),
        p(text | image)   = softmax over texts of factor x the ensemble's similarity

    Attributes:
        task: model -> weight in the task as a whole.
        texts: model -> weight in each text, [texts].
        factor: from cosine similarities to logits.
    """

    task: Mapping[str, float]
    texts: Mapping[str, NDArray[np.floating]]
    factor: float

    def of_texts(self, first: int, scores: Mapping[str, NDArray[np.floating]]) -> NDArray[np.floating]:
        """The ensemble's scores, texts looking for images.

        Args:
            first: number of the first text of these rows.
            scores: model -> cosines [rows, images].
        """
        some = next(iter(scores.values()))
        rows = slice(first, first + len(some))
        names = self._models(scores)
        return np.asarray(weighted_sum((self.texts[name][rows, None], scores[name]) for name in names), some.dtype)

    def of_images(self, first: int, scores: Mapping[str, NDArray[np.floating]]) -> NDArray[np.floating]:
        """The ensemble's scores, images looking for texts; `scores`: model -> cosines [rows, texts]."""
        del first
        guess = softmax(self.factor * combine(scores, self.task), axis=1)
        some, names = next(iter(scores.values())), self._models(scores)
        return np.asarray(
            weighted_sum(((guess @ self.texts[name])[:, None], scores[name]) for name in names), some.dtype
        )

    def _models(self, scores: Mapping[str, NDArray[np.floating]]) -> list[str]:
        """Those with a weight in the task; a model without needs no scores."""
        return [name for name in self.texts if self.task[name] > 0 and name in scores]


def query_weights(
    router: Router,
    members: Mapping[str, str],
    texts: Sequence[str],
    task: Mapping[str, float],
    clips: Mapping[str, Clip],
) -> QueryWeights:
    """The weights of every query of a retrieval task.

    Args:
        router: of the experts.
        members: expert -> the model that answers for it.
        texts: of the task.
        task: model -> its weight in the task as a whole.
        clips: name -> model.
    """
    factor = sum(weight * clips[name].model.logit_scale.exp().item() for name, weight in task.items())
    return QueryWeights(task, by_model(members, router.text_weights(texts)), factor)
