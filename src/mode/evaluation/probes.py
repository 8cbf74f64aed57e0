"""Linear probes: logistic regression on frozen image features, of one model or of all experts together.

The paper's Tables 9 and 10 (experts' features one after the other, from scratch or from the text features on) and its
appendix D (added element by element). A task has test images alone, so half of each class's are fitted and the other
half scored, by a fixed seed; zero-shot classification is scored on the same half, to compare with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor

from mode.clip.model import Clip
from mode.ensemble.combine import combine, logit_factor, logit_scales
from mode.evaluation.scores import figures_of
from mode.evaluation.tasks import Task
from mode.roles import DENSE, DENSE_LONG, EXPERT

#: Images that every class of a task needs: two to fit, so that one can be held out of them, and two to score.
LEAST_IMAGES = 4
#: What the inverse strength of the regularisation is chosen from, by the log loss in `FOLDS` folds (fewer where a class
#: has fewer images) of the fitted half.
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1_000.0)
FOLDS = 4
#: Of the halves and the folds.
SEED = 0

#: Rows of the results begin so.
PREFIX = "probe"
#: How the logits come about.
WAYS = ("zero-shot", "", "initialised")
#: What becomes of the experts' features.
TOGETHER = ("concatenated", "added")

Array = NDArray[np.float64]
#: From features [n, d] and the zero-shot logits [n, classes] of the same images to logits.
Fitted = Callable[[Array, Array], Array]
Fit = Callable[[Array, Array, NDArray[np.int64], float], Fitted]


@dataclass(frozen=True)
class Features:
    """Frozen features of a task's images.

    Attributes:
        images: [images, d].
        logits: of zero-shot classification from the same features, [images, classes].
    """

    images: Array
    logits: Array


def probe_rows(available: Collection[str], experts: Sequence[str]) -> dict[str, list[list[str]]]:
    """The rows of the results, and which models' features each is of; with several sets of them it is their mean.

    Args:
        available: names of the models that there are.
        experts: the models that answer for the experts.

    Example:
        >>> probe_rows(["dense"], ["a", "b"])["probe initialised concatenated"]
        [['a', 'b']]
    """
    kinds = {name: [[name]] for name in dense_models(available)} | {EXPERT.mean: [[name] for name in experts]}
    kinds |= {kind: [[*experts]] for kind in TOGETHER}
    return {_row(way, kind): models for way in WAYS for kind, models in kinds.items()}


def dense_models(available: Collection[str]) -> list[str]:
    """Those of the dense models that are there."""
    return [role.name for role in (DENSE, DENSE_LONG) if role.name in available]


def probe(
    task: Task,
    images: Mapping[str, Tensor],
    classes: Mapping[str, Tensor],
    weights: Mapping[str, float],
    clips: Mapping[str, Clip],
) -> dict[str, dict[str, float]]:
    """Figures of linear probes on the scored half of a classification task.

    - `probe dense`, `probe dense-long`: on the features of one model, of length 1.
    - `probe experts, mean`: the mean figure of such probes on one expert each.
    - `probe concatenated`, `probe added`: on the features of all experts, one after the other or their mean.
    - `probe initialised ...`: the same, beginning at the class texts in place of 0: the logits are those of zero-shot
      classification plus a linear function of the features, and the regularisation pulls that function to 0.
    - `probe zero-shot ...`: nothing is fitted. `concatenated` is the routed ensemble; `added` compares the mean of the
      experts' images with the mean of their texts by weight, one expert's images with another's texts, too.

    Args:
        task: of kind `classification`.
        images, classes: model -> unit vectors [images, d] and [classes, d].
        weights: model -> weight of each expert (or its stand-in) in the task.
        clips: the models, for their logit scales.

    Returns:
        Row -> figures as of `classify`; nothing where a class has fewer than `LEAST_IMAGES` images, or is the only one.
    """
    if len(task.classes) < 2 or np.bincount(task.labels, minlength=len(task.classes)).min() < LEAST_IMAGES:
        return {}
    fitted, scored = halves(task.labels)
    found: dict[str, dict[str, float]] = {}

    def scores_of(way: str, features: Features) -> Array:
        if way == "zero-shot":
            return features.logits[scored]
        fit = fit_offset if way == "initialised" else fit_scratch
        known = features.images[fitted], features.logits[fitted], task.labels[fitted]
        return fit(*known, choose_strength(fit, *known))(features.images[scored], features.logits[scored])

    alone = {name: _alone(name, images, classes, clips) for name in [*dense_models(images), *weights]}
    together = _together(images, classes, weights, clips)
    for way in WAYS:
        figures = {
            name: figures_of(task, scores_of(way, features), task.labels[scored])
            for name, features in (alone | together).items()
        }
        mean = {key: fmean(figures[name][key] for name in weights) for key in figures[TOGETHER[0]]}
        figures = {name: each for name, each in figures.items() if name not in weights} | {EXPERT.mean: mean}
        found |= {_row(way, kind): each for kind, each in figures.items()}
    return found


def halves(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the images to fit and of those to score, each class divided as evenly as it goes."""
    fitted, scored = train_test_split(np.arange(len(labels)), test_size=0.5, stratify=labels, random_state=SEED)
    return np.sort(fitted), np.sort(scored)


def choose_strength(fit: Fit, features: Array, logits: Array, labels: NDArray[np.int64]) -> float:
    """The one of `STRENGTHS` with the least log loss on what it was not fitted on; of equal ones the smallest."""
    folds = StratifiedKFold(min(FOLDS, int(np.bincount(labels).min())), shuffle=True, random_state=SEED)
    divided = list(folds.split(features, labels))

    def loss(strength: float) -> float:
        total = 0.0
        for fitted, held_out in divided:
            predict = fit(features[fitted], logits[fitted], labels[fitted], strength)
            log_probabilities = log_softmax(predict(features[held_out], logits[held_out]), axis=1)
            total -= float(log_probabilities[np.arange(len(held_out)), labels[held_out]].sum())
        return total

    return min(STRENGTHS, key=loss)


def fit_scratch(features: Array, logits: Array, labels: NDArray[np.int64], strength: float) -> Fitted:  # noqa: ARG001
    """Logistic regression with an intercept; `strength` is scikit-learn's `C`. All classes occur in `labels`."""
    model = LogisticRegression(C=strength, max_iter=1_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it has stopped a little before the optimum: no matter
        model.fit(features, labels)

    def predict(images: Array, _: Array) -> Array:
        found = np.asarray(model.decision_function(images))
        return found if found.ndim == 2 else np.stack([np.zeros(len(found)), found], axis=1)  # two classes: one margin

    return predict


def fit_offset(features: Array, logits: Array, labels: NDArray[np.int64], strength: float) -> Fitted:
    """Logistic regression that begins at given logits::

        minimise over V:  strength * sum over images of -log softmax(logits + V f)[label]  +  |V|^2 / 2

    So the weights are pulled to those of the class texts, where scikit-learn's, which knows no such beginning, are
    pulled to 0; as `strength` goes to 0 it is zero-shot classification. No intercept, as zero-shot has none.
    """
    shape = logits.shape[1], features.shape[1]
    right = np.eye(shape[0])[labels]

    def loss(flat: Array) -> tuple[float, Array]:
        change = flat.reshape(shape)
        log_probabilities = log_softmax(logits + features @ change.T, axis=1)
        gradient = strength * (np.exp(log_probabilities) - right).T @ features + change
        return float((change**2).sum() / 2 - strength * (right * log_probabilities).sum()), gradient.ravel()

    found = minimize(loss, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 1_000})
    change = found.x.reshape(shape)
    return lambda images, zeroshot: np.asarray(zeroshot + images @ change.T)


def _row(way: str, kind: str) -> str:
    return " ".join(part for part in (PREFIX, way, kind) if part)


def _alone(
    name: str, images: Mapping[str, Tensor], classes: Mapping[str, Tensor], clips: Mapping[str, Clip]
) -> Features:
    features, texts = _array(images[name]), _array(classes[name])
    return Features(features, logit_scales({name: clips[name]})[name] * features @ texts.T)


def _together(
    images: Mapping[str, Tensor],
    classes: Mapping[str, Tensor],
    weights: Mapping[str, float],
    clips: Mapping[str, Clip],
) -> dict[str, Features]:
    """The experts' features, and the ensemble's logits."""
    features = {name: _array(images[name]) for name in weights}
    texts = {name: _array(classes[name]) for name in weights}
    factor = logit_factor(logit_scales(clips), weights)
    cosines = combine({name: features[name] @ texts[name].T for name in weights}, weights)
    mean = np.mean([*features.values()], axis=0)
    return {
        "concatenated": Features(np.concatenate([*features.values()], axis=1), factor * cosines),
        "added": Features(mean, factor * mean @ combine(texts, weights).T),
    }


def _array(vectors: Tensor) -> Array:
    return np.asarray(vectors.cpu().numpy(), np.float64)
