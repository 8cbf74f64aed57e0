"""The words that tell a cluster from the others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.sparse import csr_matrix

from mode.clustering.assignment import assign
from mode.clustering.hierarchy import Clusters
from mode.data.shards.index import PairIndex
from mode.embedding.words import Vocabulary
from mode.errors import ModeError

#: Captions that are counted, at most, spread evenly over the index.
SAMPLE = 500_000
#: Captions that are counted together.
BATCH = 50_000


def name_clusters(clusters: Clusters, index: PairIndex, vectors: np.ndarray, words: int = 10) -> Clusters:
    """Give each fine and coarse cluster its most telling words, the best first, stop words left out.

    Args:
        clusters: what to name.
        index: the pairs' captions.
        vectors: of the pairs, float16 or float32 [pairs, d], in memory or memory-mapped; as many as are counted are
            assigned to clusters.
        words: at most so many per cluster; fewer, or none, where its captions have no more.

    Raises:
        ModeError: index and vectors differ in length.
    """
    if len(index) != len(vectors):
        raise ModeError(f"{len(vectors)} vectors, {len(index)} pairs in the index", "embed again")
    rows = np.unique(np.linspace(0, len(index) - 1, min(len(index), SAMPLE)).astype(np.int64))
    fine = assign(vectors, clusters, rows=rows).fine
    vocabulary = Vocabulary.learn(index.captions(rows[:: max(1, len(rows) // BATCH)]))
    counts = csr_matrix((clusters.fine, len(vocabulary)), dtype=np.float32)
    for start in range(0, len(rows), BATCH):
        some = slice(start, start + BATCH)
        found = vocabulary.count(index.captions(rows[some]))
        counts = counts + _indicator(fine[some], clusters.fine) @ found
    coarse_counts = _indicator(clusters.coarse_of_fine, clusters.coarse) @ counts
    return replace(
        clusters,
        fine_words=_telling_words(counts, vocabulary, words),
        coarse_words=_telling_words(coarse_counts, vocabulary, words),
    )


def class_tf_idf(counts: csr_matrix) -> csr_matrix:
    """Class-based TF-IDF (Grootendorst, BERTopic, 2022): tf(t, c) ln(1 + A / f(t)).

    tf(t, c) is the share of word t among the words of cluster c, f(t) its count in all clusters, A the mean number of
    words per cluster.

    Args:
        counts: [clusters, words], how often each word occurs in the captions of each cluster.

    Returns:
        weights of the same shape; 0 in a cluster without words.
    """
    in_cluster = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    in_all = np.asarray(counts.sum(axis=0), dtype=np.float64).ravel()
    idf = np.log1p(in_cluster.mean() / np.maximum(in_all, 1))
    weights = csr_matrix(counts, dtype=np.float64, copy=True)
    weights.data *= idf[weights.indices]
    weights.data /= np.repeat(np.maximum(in_cluster, 1), np.diff(weights.indptr))
    return weights


def _telling_words(counts: csr_matrix, vocabulary: Vocabulary, words: int) -> list[list[str]]:
    weights = class_tf_idf(counts)
    named = []
    for start, stop in zip(weights.indptr[:-1], weights.indptr[1:], strict=True):
        columns, values = weights.indices[start:stop], weights.data[start:stop]
        best = np.lexsort((columns, -values))[:words]
        named.append([vocabulary.words[column] for column in columns[best]])
    return named


def _indicator(groups: np.ndarray, count: int) -> csr_matrix:
    """[groups, members], 1 where the member belongs to the group."""
    members = np.arange(len(groups))
    return csr_matrix((np.ones(len(groups), dtype=np.float32), (groups, members)), shape=(count, len(groups)))
