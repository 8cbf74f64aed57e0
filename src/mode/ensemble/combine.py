"""From the models' scores to the ensemble's: weights by model, the weighted sum, the weights of single queries."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias, TypeVar

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

    Similarities, not logits: the models' logit scales play no part (as in the published code). A model of weight 0
    needs no similarities.

    >>> combine({"a": np.array([1.0, 0.0]), "b": np.array([0.0, 1.0])}, {"a": 0.75, "b": 0.25, "c": 0.0})
    array([0.75, 0.25])
    """
    return weighted_sum((weight, scores[name]) for name, weight in weights.items() if weight)


def by_model(members: Mapping[str, str], routed: Mapping[str, Weight]) -> dict[str, Weight]:
    """Weights by model from those by expert: `members` is expert -> the model that answers for it.

    >>> by_model({"a": "seed", "b": "b", "c": "seed"}, {"a": 0.25, "b": 0.5, "c": 0.25})
    {'seed': 0.5, 'b': 0.5}
    """
    weights: dict[str, Weight] = {}
    for expert, model in members.items():
        weights[model] = weights[model] + routed[expert] if model in weights else routed[expert]
    return weights


@dataclass(frozen=True)
class QueryWeights:
    """Weights of the queries of a retrieval task, by its protocol (`routing.retrieval`).

    A text has p(expert | text). What an image is about is not known before it is searched for, so it is guessed first,
    with the weights of the task as a whole (`query`)::

        p(expert | image) = sum over texts of p(text | image) p(expert | text),
        p(text | image)   = softmax over texts of factor x the ensemble's similarity

    or is not asked (`paper`, the protocol of MoDE's table 4): every image has the weights of the task as a whole.

    Attributes:
        task: model -> weight in the task as a whole.
        texts: model -> weight in each text, [texts].
        factor: from cosine similarities to logits; `None`: images have the task's weights.
    """

    task: Mapping[str, float]
    texts: Mapping[str, NDArray[np.floating]]
    factor: float | None

    def of_texts(self, first: int, scores: Mapping[str, NDArray[np.floating]]) -> NDArray[np.floating]:
        """The ensemble's scores, texts from number `first` on looking for images; model -> cosines [rows, images]."""
        return _combine_rows(scores, self._in_use(), first)

    def of_images(self, first: int, scores: Mapping[str, NDArray[np.floating]]) -> NDArray[np.floating]:  # noqa: ARG002
        """The ensemble's scores, images looking for texts; `scores`: model -> cosines [rows, texts]."""
        by_task = combine(scores, self.task)
        if self.factor is None:
            return by_task
        guess = softmax(self.factor * by_task, axis=1)
        return _combine(scores, {name: (guess @ weights)[:, None] for name, weights in self._in_use().items()})

    def _in_use(self) -> dict[str, NDArray[np.floating]]:
        """`texts` of the models that have a weight in any."""
        return {name: weights for name, weights in self.texts.items() if weights.any()}


@dataclass(frozen=True)
class TextWeights:
    """Weights of every class or text by itself, whoever is asking: experts' scores of different texts are compared.

    Attributes:
        texts: model -> weight in each class or text, [texts].
    """

    texts: Mapping[str, NDArray[np.floating]]

    def of_texts(self, first: int, scores: Mapping[str, NDArray[np.floating]]) -> NDArray[np.floating]:
        """The ensemble's scores, texts from number `first` on looking for images; model -> cosines [rows, images]."""
        return _combine_rows(scores, self.texts, first)

    def of_images(self, first: int, scores: Mapping[str, NDArray[np.floating]]) -> NDArray[np.floating]:  # noqa: ARG002
        """The ensemble's scores, images looking for texts or classes; `scores`: model -> cosines [rows, texts]."""
        return _combine(scores, self.texts)


@dataclass(frozen=True)
class ImageWeights:
    """Weights of every image of a task by itself, which its own vector gives; the texts have none.

    Attributes:
        images: model -> weight in each image, [images].
    """

    images: Mapping[str, NDArray[np.floating]]

    def of_texts(self, first: int, scores: Mapping[str, NDArray[np.floating]]) -> NDArray[np.floating]:  # noqa: ARG002
        """The ensemble's scores, texts looking for images; `scores`: model -> cosines [rows, images]."""
        return _combine(scores, self.images)

    def of_images(self, first: int, scores: Mapping[str, NDArray[np.floating]]) -> NDArray[np.floating]:
        """The ensemble's scores of images from number `first` on; `scores`: model -> cosines [rows, texts]."""
        return _combine_rows(scores, self.images, first)


#: Weights of single texts, queries or images of a task.
OneByOne: TypeAlias = QueryWeights | TextWeights | ImageWeights


def _combine_rows(
    scores: Mapping[str, NDArray[np.floating]], weights: Mapping[str, NDArray[np.floating]], first: int
) -> NDArray[np.floating]:
    """`combine` of rows from number `first` on, with a weight for each; `weights`: model -> those of all rows."""
    rows = slice(first, first + len(next(iter(scores.values()))))
    return _combine(scores, {name: each[rows, None] for name, each in weights.items()})


def _combine(
    scores: Mapping[str, NDArray[np.floating]], weights: Mapping[str, NDArray[np.floating]]
) -> NDArray[np.floating]:
    """`combine`, but with weights for single rows or columns, in the scores' type."""
    total = weighted_sum((each, scores[name]) for name, each in weights.items())
    return np.asarray(total, next(iter(scores.values())).dtype)


def logit_scales(clips: Mapping[str, Clip]) -> dict[str, float]:
    """The models' own factors from cosines to logits."""
    return {name: float(clip.model.logit_scale.exp().item()) for name, clip in clips.items()}


def logit_factor(scales: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """From cosines to logits: the weighted mean of the models' own factors; both by model."""
    return float(sum(weight * scales[name] for name, weight in weights.items()))


def query_weights(
    router: Router,
    members: Mapping[str, str],
    texts: Sequence[str],
    task: Mapping[str, float],
    scales: Mapping[str, float],
    guess_images: bool = True,
) -> QueryWeights:
    """The weights of the queries of a retrieval task.

    Args:
        router: weighs the experts for a text.
        members: expert -> the model that answers for it.
        texts: of the task.
        task: model -> weight in the task as a whole.
        scales: model -> its factor, of `logit_scales`.
        guess_images: weigh an image by the texts that it seems to show, and not as the task.
    """
    factor = logit_factor(scales, task) if guess_images else None
    return QueryWeights(task, by_model(members, router.text_weights(texts)), factor)
