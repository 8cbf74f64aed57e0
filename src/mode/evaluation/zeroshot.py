"""Zero-shot classification: an image belongs to the class whose prompts it is most similar to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from mode.evaluation import metrics
from mode.evaluation.scores import similarity_blocks
from mode.evaluation.tasks import Task


def classify(
    task: Task,
    images: Mapping[str, Tensor],
    classes: Mapping[str, Tensor],
    ensembles: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, float]]:
    """Figures of every model and ensemble on a classification task.

    Args:
        task: of kind `classification`.
        images: model -> unit vectors [images, d] (`features.encode_tasks`).
        classes: model -> unit vectors [classes, d] (`features.encode_prompts`).
        ensembles: name -> weight per model.

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
        figures[name] = {
            "acc1": metrics.accuracy(found, 1),
            "acc5": metrics.accuracy(found, 5) if len(task.classes) >= 5 else math.nan,
            "mean_per_class_recall": metrics.mean_per_class_recall(found, task.labels),
        }
        if task.metric == "roc_auc":
            figures[name]["roc_auc"] = metrics.roc_auc(np.concatenate(scores[name]), task.labels)
    return figures


def primary(task: Task, figures: Mapping[str, float]) -> float:
    """The one figure that the task asks for, of those that `classify` gives for a model."""
    if task.metric == "mean_acc1_acc5":
        return (figures["acc1"] + figures["acc5"]) / 2
    return figures[task.metric]
