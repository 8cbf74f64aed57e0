"""Retrieval both ways: the image of a text among all images, and a text of an image among all texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from mode.ensemble.combine import QueryWeights
from mode.evaluation import metrics
from mode.evaluation.scores import BLOCK, Mixing, similarity_blocks
from mode.evaluation.tasks import Task

#: The k of recall@k.
RECALL_AT = (1, 5, 10)


def retrieve(
    task: Task,
    images: Mapping[str, Tensor],
    texts: Mapping[str, Tensor],
    ensembles: Mapping[str, Mapping[str, float]],
    block: int = BLOCK,
    by_query: Mapping[str, QueryWeights] | None = None,
) -> dict[str, dict[str, float]]:
    """Recall of every model and ensemble on a retrieval task.

    `image_recall@k` is the share of texts whose image is among the k most similar images, `text_recall@k` the share of
    images with at least one of their texts among the k most similar texts: CLIP_benchmark's `image_retrieval_recall@k`
    and `text_retrieval_recall@k`. The full matrix of texts and images is never held.

    Args:
        task: of kind `retrieval`.
        images: model -> unit vectors [images, d].
        texts: model -> unit vectors [texts, d], in the order of `task.texts`.
        ensembles: name -> weight per model.
        block: similarities of one model held at once.
        by_query: name of an ensemble -> weights of its queries, in place of those in `ensembles`.

    Returns:
        Model or ensemble -> `image_recall@1`, `@5`, `@10`, `text_recall@1`, `@5`, `@10`, in 0..1.
    """
    queries = by_query or {}
    of_texts: dict[str, Mixing] = {**ensembles, **{name: weights.of_texts for name, weights in queries.items()}}
    of_images: dict[str, Mixing] = {**ensembles, **{name: weights.of_images for name, weights in queries.items()}}
    image_ranks, text_ranks = defaultdict(list), defaultdict(list)
    for start, name, scores in similarity_blocks(texts, images, of_texts, block):
        image_ranks[name].append(metrics.ranks(scores, task.owners[start : start + len(scores)]))
    for start, name, scores in similarity_blocks(images, texts, of_images, block):
        text_ranks[name].append(metrics.best_ranks(scores, task.owners, first_row=start))
    return {
        name: {
            f"{kind}_recall@{k}": metrics.accuracy(np.concatenate(parts[name]), k)
            for kind, parts in (("image", image_ranks), ("text", text_ranks))
            for k in RECALL_AT
        }
        for name in image_ranks
    }
