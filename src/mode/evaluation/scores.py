"""Cosine similarities of several models and of their ensembles, block by block, and the figures that they give."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mode.ensemble.combine import OneByOne, combine
from mode.evaluation import metrics
from mode.evaluation.tasks import Task
from mode.results import Figures, Results, Retrieval, ZeroShot

#: How models become an ensemble: a weight per model, or a function of (first row, model -> similarities of the rows).
Mixing = Mapping[str, float] | Callable[[int, Mapping[str, NDArray[Any]]], NDArray[Any]]

#: Similarities of one model that are held at once (64 MB of float32).
BLOCK = 2**24

#: The k of recall@k.
RECALL_AT = (1, 5, 10)


def similarity_blocks(
    rows: Mapping[str, Tensor], columns: Mapping[str, Tensor], ensembles: Mapping[str, Mixing], block: int = BLOCK
) -> Iterator[tuple[int, str, NDArray[Any]]]:
    """Similarities of every row with every column, by each model and each ensemble.

    Args:
        rows: model -> unit vectors [r, d], d may differ by model.
        columns: model -> unit vectors [c, d].
        ensembles: name -> weight per model, the scores being weighted sums of the models' similarities; or a function
            that computes them.
        block: similarities of one model held at once; memory is that times the number of models and one.

    Yields:
        (number of the first row, name of the model or ensemble, float32 [rows of the block, c]); for each block of rows
        all models, then all ensembles.
    """
    first = next(iter(rows))
    step = max(1, block // max(1, len(columns[first])))
    for start in range(0, len(rows[first]), step):
        stop = start + step
        similarities = {name: (rows[name][start:stop] @ columns[name].T).cpu().numpy() for name in rows}
        for name, scores in similarities.items():
            yield start, name, scores
        for name, mixing in ensembles.items():
            scores = mixing(start, similarities) if callable(mixing) else combine(similarities, mixing)
            yield start, name, scores.astype(np.float32, copy=False)


def classify(
    task: Task,
    images: Mapping[str, Tensor],
    classes: Mapping[str, Tensor],
    ensembles: Mapping[str, Mixing],
) -> dict[str, dict[str, float]]:
    """Zero-shot classification by every model and ensemble: an image is of the class whose prompts it is nearest to.

    Args:
        task: of kind `classification`.
        images: model -> unit vectors [images, d].
        classes: model -> unit vectors [classes, d].
        ensembles: name -> weight per model, or a function, as of `similarity_blocks`.

    Returns:
        Model or ensemble -> `acc1`, `acc5`, `mean_per_class_recall` (the names and meaning of CLIP_benchmark; `acc5` is
        NaN below 5 classes) and, if it is the task's metric, `roc_auc`; all in 0..1.
    """
    ranks, scores = defaultdict(list), defaultdict(list)
    for start, name, block in similarity_blocks(images, classes, ensembles):
        ranks[name].append(metrics.ranks(block, task.labels[start : start + len(block)]))
        if task.metric == "roc_auc":
            scores[name].append(block)
    figures = {}
    for name, parts in ranks.items():
        found = np.concatenate(parts)
        figures[name] = _classified(task, found, task.labels)
        if task.metric == "roc_auc":
            figures[name]["roc_auc"] = metrics.roc_auc(np.concatenate(scores[name]), task.labels)
    return figures


def figures_of(task: Task, scores: NDArray[Any], labels: NDArray[np.int64]) -> dict[str, float]:
    """The figures of `classify` from scores [images, classes] of some of the task's images, whose labels these are."""
    figures = _classified(task, metrics.ranks(scores, labels), labels)
    return figures | ({"roc_auc": metrics.roc_auc(scores, labels)} if task.metric == "roc_auc" else {})


def _classified(task: Task, found: metrics.Ranks, labels: NDArray[np.int64]) -> dict[str, float]:
    return {
        "acc1": metrics.accuracy(found, 1),
        "acc5": metrics.accuracy(found, 5) if len(task.classes) >= 5 else math.nan,
        "mean_per_class_recall": metrics.mean_per_class_recall(found, labels),
    }


def retrieve(
    task: Task,
    images: Mapping[str, Tensor],
    texts: Mapping[str, Tensor],
    ensembles: Mapping[str, Mapping[str, float]],
    block: int = BLOCK,
    by_query: Mapping[str, OneByOne] | None = None,
) -> dict[str, dict[str, float]]:
    """Retrieval both ways by every model and ensemble.

    `image_recall@k` is the share of texts whose image is among the k most similar images, `text_recall@k` the share of
    images with at least one of their texts among the k most similar texts: CLIP_benchmark's `image_retrieval_recall@k`
    and `text_retrieval_recall@k`. The full matrix of texts and images is never held.

    Args:
        task: of kind `retrieval`.
        images: model -> unit vectors [images, d].
        texts: model -> unit vectors [texts, d], in the order of `task.texts`.
        ensembles: name -> weight per model.
        block: similarities of one model held at once.
        by_query: name of an ensemble -> weights of its queries, or of its images, in place of those in `ensembles`.

    Returns:
        Model or ensemble -> `image_recall@1`, `@5`, `@10`, `text_recall@1`, `@5`, `@10`, in 0..1.
    """
    queries = by_query or {}
    of_texts: dict[str, Mixing] = {**ensembles, **{name: weights.of_texts for name, weights in queries.items()}}
    of_images: dict[str, Mixing] = {**ensembles, **{name: weights.of_images for name, weights in queries.items()}}
    ranks: dict[str, dict[str, list[metrics.Ranks]]] = defaultdict(lambda: defaultdict(list))
    for start, name, scores in similarity_blocks(texts, images, of_texts, block):
        ranks[name]["image"].append(metrics.ranks(scores, task.owners[start : start + len(scores)]))
    for start, name, scores in similarity_blocks(images, texts, of_images, block):
        ranks[name]["text"].append(metrics.best_ranks(scores, task.owners, first_row=start))
    return {
        name: {
            f"{kind}_recall@{k}": metrics.accuracy(np.concatenate(parts), k)
            for kind, parts in both.items()
            for k in RECALL_AT
        }
        for name, both in ranks.items()
    }


def primary(task: Task, figures: Mapping[str, float]) -> float:
    """The one figure that grows with the experts: what a classification task asks for, or the mean recall@10."""
    if task.kind == "retrieval":
        return (figures["image_recall@10"] + figures["text_recall@10"]) / 2
    if task.metric == "mean_acc1_acc5":
        return (figures["acc1"] + figures["acc5"]) / 2
    return figures[task.metric]


@dataclass
class Collected:
    """Figures of models and mixtures as they come, task by task.

    Attributes:
        names: the order of their rows; what is not among them comes later.
        zeroshot: classification task -> model -> the task's one figure.
        details: classification task -> model -> all its figures.
        retrieval: retrieval task -> model -> its recalls.
    """

    names: Sequence[str] = ()
    zeroshot: dict[str, dict[str, float]] = field(default_factory=dict)
    details: dict[str, Mapping[str, Figures]] = field(default_factory=dict)
    retrieval: dict[str, Mapping[str, Figures]] = field(default_factory=dict)

    def add(self, task: Task, figures: Mapping[str, dict[str, float]]) -> None:
        """Those of one task, by model."""
        if task.kind == "retrieval":
            self.retrieval[task.name] = figures
        else:
            self.details[task.name] = figures
            self.zeroshot[task.name] = {name: primary(task, each) for name, each in figures.items()}

    def results(self, tasks: Sequence[Task]) -> Results:
        """All of them; a mean is over the classification tasks that have a figure."""
        names = dict.fromkeys(chain(self.names, *self.zeroshot.values()))
        known = {name: [each[name] for each in self.zeroshot.values() if name in each] for name in names}
        means = {name: fmean(values) for name, values in known.items() if values}
        return Results(
            zeroshot=ZeroShot(mean=means, tasks=self.zeroshot),
            retrieval=Retrieval(tasks=self.retrieval),
            details=self.details,
            tasks={task.name: task.summary() for task in tasks},
        )
