"""How models become one answer to a task: what a router makes of it, and the figures of models and mixtures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mode.ensemble.combine import ImageWeights, OneByOne, QueryWeights, TextWeights, by_model, logit_factor
from mode.ensemble.router import Router
from mode.ensemble.rules import mean_weights
from mode.evaluation.scores import Mixing, classify, retrieve
from mode.evaluation.tasks import Task


@dataclass(frozen=True)
class Mixture:
    """How models become one answer to a task.

    Attributes:
        weights: model -> weight in the task as a whole.
        one_by_one: weights of its classes, texts, queries or images by themselves, in place of these.
    """

    weights: Mapping[str, float]
    one_by_one: OneByOne | None = None

    @property
    def encoders(self) -> int:
        """Image encoders that run for an image, that of a router of images among them."""
        match self.one_by_one:
            case TextWeights(texts):
                return sum(bool((weights > 0).any()) for weights in texts.values())
            case ImageWeights(images):
                return 1 + sum(bool((weights > 0).any()) for weights in images.values())
        return sum(weight > 0 for weight in self.weights.values())


@dataclass(frozen=True)
class Routed:
    """What a router makes of a task.

    Attributes:
        weights: expert -> weight in the task.
        texts: expert -> weight in each text of a retrieval task, [texts]; None: one weight for all of them.
        guess_images: with `texts`, weigh an image by the texts that it seems to show, and not as the task.
        images: expert -> weight in each image, [images]; None: the router is one of words.
    """

    weights: dict[str, float]
    texts: dict[str, NDArray[np.float64]] | None = None
    guess_images: bool = True
    images: dict[str, NDArray[np.float64]] | None = None

    @classmethod
    def by(cls, router: Router, task: Task, images: NDArray[np.floating] | None = None) -> Routed:
        """As the router's rule has it for such a task; `images`: of a router of images, the task's vectors [n, d]."""
        if images is not None:
            by_image = router.image_weights(images)
            return cls(mean_weights(by_image), images=by_image)
        weights, protocol = router.weights(task.prompts), router.routing.protocol
        if task.kind != "retrieval" or protocol == "together":
            return cls(weights)
        return cls(weights, router.text_weights(task.texts), guess_images=protocol == "query")

    def among(self, weights: dict[str, float]) -> Routed:
        """With these weights in the task, and in each text with the experts alone that have one there."""
        if self.texts is None:
            return Routed(weights)
        kept = [expert for expert, weight in weights.items() if weight > 0]
        total = np.sum([self.texts[expert] for expert in kept], axis=0)
        texts = {
            # A text that weighs them all with 0 is weighed as the task.
            expert: np.divide(of_texts, total, out=np.full_like(total, weights[expert]), where=total > 0)
            if expert in kept
            else np.zeros_like(total)
            for expert, of_texts in self.texts.items()
        }
        return replace(self, weights=weights, texts=texts)

    def mixture(self, members: Mapping[str, str], scales: Mapping[str, float]) -> Mixture:
        """Of models.

        Args:
            members: expert -> the model that answers for it.
            scales: model -> its factor from cosines to logits, of `logit_scales`.
        """
        weights = by_model(members, self.weights)
        if self.images is not None:
            return Mixture(weights, ImageWeights(by_model(members, self.images)))
        if self.texts is None:
            return Mixture(weights)
        factor = logit_factor(scales, weights) if self.guess_images else None
        return Mixture(weights, QueryWeights(weights, by_model(members, self.texts), factor))


def figures_of_all(
    task: Task, images: Mapping[str, Tensor], texts: Mapping[str, Tensor], mixtures: Mapping[str, Mixture]
) -> dict[str, dict[str, float]]:
    """Figures of every model and every mixture, by name, as of `classify` or `retrieve`.

    Args:
        task: of either kind.
        images, texts: model -> unit vectors of the task's images, and of its classes or texts.
        mixtures: by name.
    """
    weights = {name: mixture.weights for name, mixture in mixtures.items()}
    one_by_one = {name: mixture.one_by_one for name, mixture in mixtures.items() if mixture.one_by_one is not None}
    if task.kind == "retrieval":
        return retrieve(task, images, texts, weights, by_query=one_by_one)
    of_images: dict[str, Mixing] = {
        name: each.of_images for name, each in one_by_one.items() if isinstance(each, TextWeights | ImageWeights)
    }
    return classify(task, images, texts, {**weights, **of_images})
