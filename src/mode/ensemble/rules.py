"""From a task's words to a weight per data expert: p(expert | task).

A *class* here is one vector of the task's metadata: a class name in its prompt templates, or one text of a retrieval
task. An expert's *condition* is the set of fine centres of the cluster that it was trained on. Conditions are keyed by
the expert's name, so that experts of several sources stand side by side, and weights come back under the same names.

Three rules are functions of distances to the conditions alone: `published_weights` (of the published code of MoDE, Ma
et al., CVPR 2024), `paper_weights` (of the paper's text) and the default, `calibrated_weights`, whose one temperature
`calibrate_temperature` sets from training captions. `evidence` asks the experts' training captions instead:
`log_densities` how densely they lie around a class, `word_scores` how often they use its words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.sparse import csr_matrix
from scipy.special import log_softmax, logsumexp, softmax

from mode.errors import ModeError

#: Classes whose distances to all centres are held at once.
_BLOCK = 4096

#: Classes whose distances to all captions of an expert are held at once.
_EVIDENCE_BLOCK = 256

#: Captions of each expert that are made up, with the mean rate of every word: no word is proof.
_PSEUDO_CAPTIONS = 100.0

#: Where captions leave no doubt, `calibrate_factors` would go on for ever.
_LARGEST_FACTOR = 10.0

#: Share of a caption's words that `partial_captions` keeps: a task's words describe a pair about that incompletely.
KEPT_WORDS = 0.5

#: Sums of weights that ought to be equal differ by no more than this.
_ROUNDING = 1e-9

#: The temperature is searched between these multiples of the mean squared distance to the nearest centre.
_TEMPERATURE_RANGE = (1e-4, 1e4)


class Nearest(NamedTuple):
    """Distances between classes and experts.

    Attributes:
        experts: names, in the order of the columns.
        distances: Euclidean, float64 [classes, experts]: from a class to the nearest fine centre of an expert.
    """

    experts: tuple[str, ...]
    distances: NDArray[np.float64]


def class_distances(vectors: NDArray[np.floating], conditions: Mapping[str, NDArray[np.floating]]) -> Nearest:
    """Distance from every class to the nearest fine centre of every expert.

    Args:
        vectors: of the classes [L, d], any float type.
        conditions: expert's name -> its fine centres [k, d]; k may differ, and is at least 1.

    Example:
        >>> class_distances(np.array([[0.0, 0.0]]), {"a": np.array([[3.0, 4.0]])}).distances
        array([[5.]])
    """
    distances = np.empty((len(vectors), len(conditions)))
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        for column, centres in enumerate(conditions.values()):
            distances[start : start + _BLOCK, column] = np.sqrt(_squared_distances(block, centres).min(axis=1))
    return Nearest(tuple(conditions), distances)


def published_weights(nearest: Nearest, divisor: float = 8.0) -> dict[str, float]:
    """Weights as the published code computes them (`apps/mode/post_report_ensemble.py` of MetaCLIP).

    With L classes, d_l the distance of class l to its nearest fine centre and c(l) the expert of that centre,

        w_c = sum over {l : c(l) = c} of exp((a - d_l) * b),    p = softmax(w / divisor),
        a = exp(0.5 - sqrt(L)) if L < 10 else 0,                b = 5 * log10(max(10, L - 200)).

    An expert that no class is nearest to has w = 0, and still takes part in the softmax. (The published code sizes the
    weights by the clusters that have fine centres but indexes them by cluster number; names cannot go astray so.)
    A class at the same distance from two experts counts for the one named first.

    The constants suit distances between SimCSE vectors. The weights are nearly uniform: with all classes on one of four
    experts, 0.6 away, that expert gets 0.26 for 10 classes, 0.38 for 100, 0.25 for 1000.

    Args:
        nearest: L classes by any number of experts; no class at all gives uniform weights.
        divisor: 8 is the published one; 1 sharpens the weights.
    """
    affinities = _published_affinities(nearest, len(nearest.distances))
    summed = np.bincount(nearest.distances.argmin(axis=1), affinities, minlength=len(nearest.experts))
    return _named(nearest.experts, softmax(summed / divisor))


def published_posteriors(nearest: Nearest, divisor: float = 8.0) -> NDArray[np.float64]:
    """`published_weights` of every class as a task of its own: [classes, experts], rows of sum 1."""
    affinities = np.zeros_like(nearest.distances)
    owners = nearest.distances.argmin(axis=1)
    np.put_along_axis(affinities, owners[:, None], _published_affinities(nearest, 1)[:, None], axis=1)
    return np.asarray(softmax(affinities / divisor, axis=1))


def paper_weights(
    vectors: NDArray[np.floating], conditions: Mapping[str, NDArray[np.floating]], bandwidth: float = 1.0
) -> dict[str, float]:
    """Weights as the paper's text has them (section 3.4): softmax over experts of summed affinities.

        A(l, s) = exp(-|e_l - e_s|^2 / bandwidth)
        p(c | T) = softmax_c( sum over classes l and the centres s of c of A(l, s) )

    A sum, not an average: twice the classes, or twice the centres, sharpen the weights, until one expert has them all.
    That is the expert whose centres lie closest together around the task if the bandwidth is narrow, and merely the one
    whose centres lie most in the middle of everything if it is as wide as the distances are.

    Args:
        vectors: of the classes [L, d].
        conditions: expert's name -> its fine centres [k, d].
        bandwidth: lambda, in squared units of distance.
    """
    return _named(tuple(conditions), softmax(_paper_affinities(vectors, conditions, bandwidth).sum(axis=0)))


def paper_posteriors(
    vectors: NDArray[np.floating], conditions: Mapping[str, NDArray[np.floating]], bandwidth: float = 1.0
) -> NDArray[np.float64]:
    """`paper_weights` of every class as a task of its own: [classes, experts], rows of sum 1."""
    return np.asarray(softmax(_paper_affinities(vectors, conditions, bandwidth), axis=1))


def calibrated_weights(nearest: Nearest, temperature: float) -> dict[str, float]:
    """The default: per class a softmax over experts, averaged over the classes.

        p(c | T) = mean over classes l of softmax_c( -d(l, c)^2 / temperature )

    with d(l, c) the distance from class l to the nearest fine centre of expert c. It is the posterior of a mixture of
    equal spherical Gaussians at the centres, of which only the nearest of each expert counts. Rescaling all distances
    by s and the temperature by s^2 changes nothing; a task's number of classes does not sharpen or flatten the weights;
    as the temperature goes to 0 the weight becomes the share of the classes that are nearest to the expert, and as it
    grows, uniform.

    Args:
        nearest: L classes by any number of experts; no class at all gives uniform weights.
        temperature: in squared units of distance, see `calibrate_temperature`.
    """
    if not len(nearest.distances):
        return uniform_weights(nearest.experts)
    return _named(nearest.experts, posteriors(nearest, temperature).mean(axis=0))


def posteriors(nearest: Nearest, temperature: float) -> NDArray[np.float64]:
    """p(expert | class), [classes, experts], rows of sum 1; `calibrated_weights` is their mean."""
    return np.asarray(softmax(-(nearest.distances**2) / temperature, axis=1))


def uniform_weights(experts: Sequence[str]) -> dict[str, float]:
    """The same weight for every expert: the control for routing."""
    return {expert: 1 / len(experts) for expert in experts}


def mean_weights(weights: Mapping[str, NDArray[np.floating]]) -> dict[str, float]:
    """Expert -> the mean of its weights in single classes, texts or images, [n]."""
    return {expert: float(each.mean()) for expert, each in weights.items()}


def largest_first(weights: Mapping[str, float]) -> list[str]:
    """Experts by weight; equal ones stay in the given order.

    >>> largest_first({"expert-0": 0.2, "expert-1": 0.5, "expert-2": 0.3})
    ['expert-1', 'expert-2', 'expert-0']
    """
    return sorted(weights, key=lambda expert: -weights[expert])


def keep_top(weights: Mapping[str, float], count: int) -> dict[str, float]:
    """Only the experts with the largest weights, so many (all if there are fewer), scaled to sum 1; the others get 0.

    Raises:
        ModeError: `count` is below 1.

    Example:
        >>> keep_top({"a": 0.25, "b": 0.5, "c": 0.25}, 2)
        {'a': 0.3333333333333333, 'b': 0.6666666666666666, 'c': 0.0}
    """
    if count < 1:
        raise ModeError(f"top_k: {count}", "keep at least one expert")
    return _keep(weights, largest_first(weights)[:count])


def keep_share(weights: Mapping[str, float], share: float) -> dict[str, float]:
    """The fewest experts whose weights sum to at least `share`, scaled to sum 1; the others get 0.

    Raises:
        ModeError: `share` is not in 0..1.

    Example:
        >>> keep_share({"a": 0.25, "b": 0.5, "c": 0.25}, 0.75)
        {'a': 0.3333333333333333, 'b': 0.6666666666666666, 'c': 0.0}
    """
    if not 0 <= share <= 1:
        raise ModeError(f"threshold: {share}", "it is a share of the summed weights, from 0 to 1")
    order = largest_first(weights)
    sums = accumulate(weights[expert] for expert in order)
    return _keep(weights, order[: 1 + sum(total < share - _ROUNDING for total in sums)])


def calibrate_temperature(distances: NDArray[np.floating], assigned: NDArray[np.integer]) -> float:
    """The temperature under which partial captions best predict which expert their pair belongs to.

    A task's words are only a partial description of a pair. So take training captions, embed each with a part of its
    words missing (`partial_captions`), and ask what `calibrated_weights` makes of it: the probability that it gives to
    the expert of the *whole* caption. The temperature with the largest likelihood is neither 0 (some partial captions
    land on another expert, and certainty there costs without bound) nor infinite (most do not). With the whole captions
    it would always be 0. No test image, label or class name is looked at.

    The mean negative log likelihood is convex in 1 / temperature, so the search over log temperature has one optimum.
    Where it has none inside, because the captions leave no doubt or say nothing, the bound of the search is returned:
    1e-4 or 1e4 times the mean squared distance to the nearest centre.

    Args:
        distances: of the partial captions [n, experts] (`class_distances`), n at least 1.
        assigned: [n]: column of the expert that the whole caption is assigned to.

    Returns:
        Temperature in squared units of distance.
    """
    squared = distances.astype(np.float64) ** 2
    scale = float(squared.min(axis=1).mean()) or float(squared.mean()) or 1.0
    return _likeliest(lambda temperature: -squared / temperature, assigned, scale, precision=1e-4)


def log_densities(
    vectors: NDArray[np.floating], evidence: Mapping[str, NDArray[np.floating]], temperature: float
) -> NDArray[np.float64]:
    """How densely each expert's training captions lie around each class, [classes, experts].

        f(l, c) = log of the mean over the captions i of expert c of exp(-|l - i|^2 / temperature)

    A kernel density (Parzen window). Its softmax over experts is the posterior with all experts equally likely
    beforehand: they are trained for the same number of samples, so that what an expert has seen around a class is its
    density there times a constant, however many captions its cluster has. In `posteriors` the nearest fine centre
    stands for all of an expert's captions, and that one of them uses the words counts as much as that all do.

    Rescaling all vectors by s and the temperature by s^2 changes nothing, and another size of an expert's sample
    nothing but for chance. A caption that joins an expert nearer to a class than its others never lowers its density.

    Args:
        vectors: of the classes [L, d], any float type.
        evidence: expert's name -> vectors of its training captions [n, d], a random sample; n may differ, at least 1.
        temperature: in squared units of distance, see `calibrate_evidence`.

    Example:
        >>> log_densities(np.zeros((1, 1)), {"a": np.array([[0.0], [9.0]]), "b": np.zeros((1, 1))}, 1.0)
        array([[-0.69314718,  0.        ]])
    """
    densities = np.empty((len(vectors), len(evidence)))
    for start in range(0, len(vectors), _EVIDENCE_BLOCK):
        block = slice(start, start + _EVIDENCE_BLOCK)
        for column, captions in enumerate(evidence.values()):
            densities[block, column] = _log_density(_squared_distances(vectors[block], captions), temperature)
    return densities


def word_scores(
    used: csr_matrix,
    counts: NDArray[np.integer],
    sizes: NDArray[np.integer],
    owners: NDArray[np.integer] | None = None,
) -> NDArray[np.float64]:
    """How well the words of texts suit each expert, [texts, experts]: naive Bayes.

        score(t, c) = sum over the words w of t of log p(w | c),
        p(w | c)    = (captions of c with w + 100 q(w)) / (captions of c + 100),    q(w) the mean rate of the experts

    A text without a word has 0 for every expert.

    Args:
        used: [texts, words], 1 where the text has the word.
        counts: [experts, words], captions of each expert with the word.
        sizes: [experts], captions of each expert.
        owners: the texts are parts of captions that are counted, of these experts, and are to be left out of them.
    """
    rates = counts / sizes[:, None]
    pseudo = _PSEUDO_CAPTIONS * rates.mean(axis=0)
    scores = np.asarray(used @ np.log((counts + pseudo) / (sizes[:, None] + _PSEUDO_CAPTIONS)).T)
    if owners is not None:
        fewer, smaller = np.maximum(counts - 1, 0), np.maximum(sizes - 1, 0)
        without = np.asarray(used @ np.log((fewer + pseudo) / (smaller[:, None] + _PSEUDO_CAPTIONS)).T)
        scores[np.arange(len(owners)), owners] = without[np.arange(len(owners)), owners]
    return scores


def calibrate_factors(
    densities: NDArray[np.floating], words: NDArray[np.floating], owners: NDArray[np.integer]
) -> tuple[float, float]:
    """The factors a, b >= 0 under which softmax(a densities + b words) makes the right columns likeliest.

    Words of a caption go together, and so do densities and words: taken as independent they would be far too sure. The
    likelihood is concave in both factors.

    Args:
        densities, words: [n, experts] each, of partial captions that are left out of the evidence.
        owners: [n], columns.
    """

    def mean_surprise(factors: NDArray[np.float64]) -> float:
        log_probabilities = log_softmax(factors[0] * densities + factors[1] * words, axis=1)
        return -float(log_probabilities[np.arange(len(owners)), owners].mean())

    found = minimize(mean_surprise, np.array([0.5, 0.5]), bounds=[(0.0, _LARGEST_FACTOR)] * 2, method="L-BFGS-B")
    return float(found.x[0]), float(found.x[1])


def calibrate_evidence(
    partial: NDArray[np.floating],
    evidence: Mapping[str, NDArray[np.floating]],
    owners: NDArray[np.integer],
    rows: NDArray[np.integer],
) -> tuple[float, NDArray[np.float64]]:
    """The temperature of `log_densities` under which partial captions best predict which expert owns them.

    As `calibrate_temperature`, with the experts' captions in place of their centres. Each whole caption is itself among
    its expert's, and is left out of them when its part is weighed: leave one out.

    Args:
        partial: vectors of captions of the evidence, each with a part of its words missing, [n, d], n at least 1.
        evidence: as in `log_densities`; an expert of a single caption keeps it.
        owners, rows: [n]: whose evidence each caption is of (a column) and its row there.

    Returns:
        Temperature in squared units of distance, and the log densities with it, [n, experts].
    """
    squared = []
    for column, captions in enumerate(evidence.values()):
        distances = _squared_distances(partial, captions).astype(np.float32)  # n times all captions: half the memory
        if len(captions) > 1:
            own = np.flatnonzero(owners == column)
            distances[own, rows[own]] = np.inf
        squared.append(distances)
    nearest = np.min([distances.min(axis=1) for distances in squared], axis=0)
    scale = float(nearest.mean()) or 1.0

    def densities(temperature: float) -> NDArray[np.float64]:
        return np.stack([_log_density(distances, temperature) for distances in squared], axis=1)

    temperature = _likeliest(densities, owners, scale, precision=1e-2)
    return temperature, densities(temperature)


def partial_captions(captions: Sequence[str], random_seed: int, kept: float = KEPT_WORDS) -> list[str]:
    """Each caption with a random part of its words (split at white space), in their order; at least one word stays.

    Args:
        captions: any; one without words comes back as it is.
        random_seed: the same captions, seed and share give the same words.
        kept: probability that a word stays.

    Example:
        >>> partial_captions(["a black dog runs over wet grass"], random_seed=0)
        ['black dog runs']
    """
    random = np.random.default_rng(random_seed)
    partial = []
    for caption in captions:
        words = caption.split()
        if not words:
            partial.append(caption)
            continue
        stays = random.random(len(words)) < kept
        stays[random.integers(len(words))] |= not stays.any()
        partial.append(" ".join(word for word, stay in zip(words, stays, strict=True) if stay))
    return partial


def _published_affinities(nearest: Nearest, classes: int) -> NDArray[np.float64]:
    """exp((a - d) b) of every class and its nearest expert, [L], in a task of so many classes (`published_weights`)."""
    shift = np.exp(0.5 - np.sqrt(classes)) if classes < 10 else 0.0
    sharpness = 5 * np.log10(max(10, classes - 200))
    return np.asarray(np.exp((shift - nearest.distances.min(axis=1)) * sharpness))


def _paper_affinities(
    vectors: NDArray[np.floating], conditions: Mapping[str, NDArray[np.floating]], bandwidth: float
) -> NDArray[np.float64]:
    """Sum over an expert's centres of exp(-|e_l - e_s|^2 / bandwidth), [classes, experts] (`paper_weights`)."""
    affinities = np.empty((len(vectors), len(conditions)))
    for start in range(0, len(vectors), _BLOCK):
        block = slice(start, start + _BLOCK)
        for column, centres in enumerate(conditions.values()):
            affinities[block, column] = np.exp(-_squared_distances(vectors[block], centres) / bandwidth).sum(axis=1)
    return affinities


def _likeliest(
    scores: Callable[[float], NDArray[np.float64]], right: NDArray[np.integer], scale: float, precision: float
) -> float:
    """The temperature whose scores [n, experts] make the right columns [n] likeliest, searched over its logarithm.

    `scale` is the middle of the search, `precision` of the logarithm.
    """

    def mean_surprise(log_temperature: float) -> float:
        log_probabilities = log_softmax(scores(scale * np.exp(log_temperature)), axis=1)
        return -float(log_probabilities[np.arange(len(right)), right].mean())

    bounds = tuple(np.log(_TEMPERATURE_RANGE))
    found = minimize_scalar(mean_surprise, bounds=bounds, method="bounded", options={"xatol": precision})
    return scale * float(np.exp(found.x))


def _log_density(squared: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """[n, captions] -> [n]: log of the mean of exp(-squared / temperature); captions at infinity do not count."""
    counted = np.isfinite(squared).sum(axis=1)
    return np.asarray(logsumexp(-squared / temperature, axis=1) - np.log(counted), np.float64)


def _squared_distances(vectors: NDArray[np.floating], centres: NDArray[np.floating]) -> NDArray[np.float64]:
    """[n, d] and [k, d] -> [n, k]; rounding never makes one negative."""
    x, c = vectors.astype(np.float64), centres.astype(np.float64)  # in float32, |x|^2 - 2xc + |c|^2 would cancel
    squared = (x**2).sum(axis=1)[:, None] - 2 * (x @ c.T) + (c**2).sum(axis=1)[None, :]
    return np.asarray(squared.clip(min=0.0))


def _keep(weights: Mapping[str, float], kept: Sequence[str]) -> dict[str, float]:
    total = sum(weights[expert] for expert in kept)
    return {expert: weight / total if expert in kept else 0.0 for expert, weight in weights.items()}


def _named(experts: Sequence[str], weights: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(experts, weights.tolist(), strict=True))
