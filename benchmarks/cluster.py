"""Clustering: 100,000 captions into 1,024 fine clusters, and millions of them from the disk."""

from __future__ import annotations

import os
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from benchmarks.harness import Input, Prepare, Race, Run, Size, Target, faster, figure, share_of_time

#: Makes so many clusters of vectors; returns labels and iterations.
Fit = Callable[[np.ndarray, int], tuple[np.ndarray, int]]
Sizes = dict[str, tuple[int, int, int]]

#: Vectors, dimensions, clusters.
SIZES: Sizes = {"quick": (2_000, 16, 16), "full": (100_000, 384, 1_024), "large": (100_000, 384, 1_024)}
#: The same, for the peers that compare every point with every place in every cluster.
SMALL: Sizes = {"quick": (512, 16, 8), "full": (4_096, 384, 64), "large": (8_192, 384, 128)}
ITERATIONS = 20
#: Iterations of a fit from the disk.
PASSES = 3
KERNELMACHINE = "kernelmachine balanced_kmeans"
#: Environment variable: the folder of a checkout of it.
CHECKOUT = "BALANCED_KMEANS"
BALANCE = 1.1


def vectors_like_captions(count: int, dimensions: int, random_seed: int = 0) -> np.ndarray:
    """Unit vectors float32 [count, dimensions] that lie as embedded captions do: in topics of very different sizes.

    Sizes of topics are log-normal (sigma 1: the largest is some twenty times the mean), as much variance lies within
    topics as between them, and it falls with the number of the dimension, as that of an SVD does.
    """
    random = np.random.default_rng(random_seed)
    spectrum = (np.arange(1, dimensions + 1) ** -0.5).astype(np.float32)
    topics = max(2, min(3_000, count // 8))
    centres = _unit(random.standard_normal((topics, dimensions), dtype=np.float32) * spectrum)
    shares = random.lognormal(0, 1, topics)
    vectors = np.empty((count, dimensions), dtype=np.float32)
    for start in range(0, count, 65_536):
        stop = min(start + 65_536, count)
        of_topic = random.choice(topics, stop - start, p=shares / shares.sum())
        noise = _unit(random.standard_normal((stop - start, dimensions), dtype=np.float32) * spectrum)
        vectors[start:stop] = _unit(centres[of_topic] + noise)
    return vectors


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def quality(vectors: np.ndarray, labels: np.ndarray, clusters: int) -> dict[str, Any]:
    """Inertia to the means of the clusters, the same formula for every side, and the largest cluster over the mean."""
    sizes = np.bincount(labels, minlength=clusters)
    order = np.argsort(labels, kind="stable")
    starts = (np.cumsum(sizes) - sizes).clip(max=len(order) - 1)
    sums = np.add.reduceat(vectors[order].astype(np.float64), starts)
    sums[sizes == 0] = 0
    within = np.square(vectors, dtype=np.float64).sum() - (np.square(sums).sum(axis=1) / np.maximum(sizes, 1)).sum()
    return {
        "inertia": float(within / len(vectors)),
        "imbalance": float(sizes.max() / sizes.mean()),
        "empty": int((sizes == 0).sum()),
    }


def _make(given: Input, sizes: Sizes, random_seed: int) -> None:
    np.save(given.folder / "vectors.npy", vectors_like_captions(*sizes[given.size][:2], random_seed))


def _timed(fit: Fit, module: str, sizes: Sizes) -> Prepare:
    """A side that times the fit alone, and then judges its labels."""
    return partial(_judged, fit=fit, module=module, sizes=sizes)


def _judged(given: Input, fit: Fit, module: str, sizes: Sizes) -> Run:
    if module == "kmeans_pytorch":
        sys.path.insert(0, os.environ[CHECKOUT])
        # Its soft-DTW distance needs numba and a GPU, and is not used here.
        sys.modules["kmeans_pytorch.soft_dtw_cuda"] = types.SimpleNamespace(SoftDTW=None)  # type: ignore[assignment]
    import_module(module)
    vectors, clusters = np.load(given.folder / "vectors.npy"), sizes[given.size][2]

    def run() -> dict[str, Any]:
        started = time.perf_counter()
        labels, iterations = fit(vectors, clusters)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "iterations": int(iterations), **quality(vectors, labels, clusters)}

    return run


def _ours(vectors: np.ndarray, clusters: int) -> tuple[np.ndarray, int]:
    from mode.clustering.kmeans import balanced_kmeans
    from mode.clustering.rows import Rows

    found = balanced_kmeans(Rows(vectors), clusters, BALANCE, ITERATIONS, random_seed=0)
    return found.labels, found.iterations


def _faiss(vectors: np.ndarray, clusters: int) -> tuple[np.ndarray, int]:
    import faiss

    found = faiss.Kmeans(vectors.shape[1], clusters, niter=ITERATIONS, seed=1, max_points_per_centroid=len(vectors))
    found.train(vectors)
    _, labels = found.index.search(vectors, 1)  # training does not say where the points are; ours does
    return labels[:, 0], ITERATIONS


def _sklearn(vectors: np.ndarray, clusters: int) -> tuple[np.ndarray, int]:
    """Lloyd from random points, as the others: its k-means++ alone takes longer than all other sides together."""
    from sklearn.cluster import KMeans

    found = KMeans(clusters, init="random", n_init=1, max_iter=ITERATIONS, random_state=0).fit(vectors)
    return found.labels_, found.n_iter_


def _hungarian(vectors: np.ndarray, clusters: int) -> tuple[np.ndarray, int]:
    """Balanced k-means of Malinen and Fränti (2014): the best balanced assignment in every iteration."""
    from scipy.optimize import linear_sum_assignment

    places = np.repeat(np.arange(clusters), int(BALANCE * len(vectors) / clusters))
    centres = vectors[np.random.default_rng(0).choice(len(vectors), clusters, replace=False)]
    labels = np.full(len(vectors), -1)
    for iteration in range(1, ITERATIONS + 1):
        costs = np.square(centres).sum(axis=1) - 2 * vectors @ centres.T
        new = places[linear_sum_assignment(costs[:, places])[1]]
        if (new == labels).all():
            return labels, iteration
        labels = new
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, vectors)
        sizes = np.bincount(labels, minlength=clusters)[:, None]
        centres = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres).astype(np.float32)
    return labels, ITERATIONS


def _kernelmachine(vectors: np.ndarray, clusters: int) -> tuple[np.ndarray, int]:
    """github.com/kernelmachine/balanced-kmeans, from a checkout: it is on no package registry."""
    import torch
    from kmeans_pytorch import KMeans  # type: ignore[import-not-found]

    np.random.seed(0)
    found = KMeans(n_clusters=clusters, balanced=True)
    return found.fit(torch.from_numpy(vectors), iter_limit=ITERATIONS, tqdm_flag=False).numpy(), ITERATIONS


def _make_on_disk(given: Input, count: int, dimensions: int) -> None:
    """float16 [count, dimensions]: a million different vectors again and again, each time with other grain."""
    vectors = np.lib.format.open_memmap(given.folder / "vectors.npy", "w+", np.float16, (count, dimensions))
    random, grain = np.random.default_rng(0), np.float32(0.02)
    base = vectors_like_captions(min(count, 250_000), dimensions)
    for start in range(0, count, len(base)):
        block = base[: min(len(base), count - start)]
        vectors[start : start + len(block)] = block + grain * random.standard_normal(block.shape, dtype=np.float32)
        vectors.flush()


def _from_disk(given: Input, clusters: int) -> Run:
    """Fit on all vectors and assign all of them: the stages `cluster` and `assign` with `sample` set to all."""
    from mode.clustering.assignment import assign
    from mode.clustering.hierarchy import fit_clusters
    from mode.params import ClusteringParams

    vectors = np.load(given.folder / "vectors.npy", mmap_mode="r")
    params = ClusteringParams(fine=clusters, coarse=4, sample=len(vectors), iterations=PASSES)

    def run() -> dict[str, Any]:
        found = fit_clusters(vectors, params, clusters, 4, random_seed=0)
        assign(vectors, found)
        kept = {name: found.statistics[name] for name in ("iterations", "imbalance", "inertia")}
        return {"pairs": len(vectors), **kept, "inertia": kept["inertia"] / len(vectors)}

    return run


def _disk_race(pairs: int, dimensions: int, clusters: int, sizes: tuple[Size, ...]) -> Race:
    return Race(
        name=f"cluster-disk-{pairs // 1_000}k",
        step=f"fit and assign {pairs:,} x {dimensions} float16 from disk, m = {clusters:,}, {PASSES} passes",
        sides={"mode": partial(_from_disk, clusters=clusters)},
        targets=(Target("peak memory at most 2 GB", lambda sides: sides["mode"].peak_mb / 1e3, 2.0, at_most=True),),
        make=partial(_make_on_disk, count=pairs, dimensions=dimensions),
        inputs=f"cluster-{pairs}",
        needs_gb=pairs * dimensions * 2 / 1e9,
        repeats=0,
        sizes=sizes,
        notes="one run, no warm-up: it takes minutes, and every pass reads the file block by block anyway",
    )


OURS = "mode.clustering.kmeans"
FAISS, HUNGARIAN = "faiss.Kmeans, unbalanced", "Hungarian (scipy)"
EXACT = "inertia at most 1.03x the exact balanced one"
RACES = (
    Race(
        name="cluster",
        step="fine clustering, 100,000 x 384, m = 1,024",
        sides={
            "mode": _timed(_ours, OURS, SIZES),
            FAISS: _timed(_faiss, "faiss", SIZES),
            "scikit-learn KMeans, unbalanced": _timed(_sklearn, "sklearn.cluster", SIZES),
        },
        targets=(
            Target("balanced in at most 1.5x faiss's time", share_of_time("mode", FAISS), 1.5, at_most=True),
            Target("largest cluster at most 1.1x the mean", figure("mode", "imbalance"), 1.1, at_most=True),
            Target("inertia at most 1.03x faiss's", figure("mode", "inertia", over=FAISS), 1.03, at_most=True),
        ),
        make=partial(_make, sizes=SIZES, random_seed=0),
        notes="all sides: the same points, 20 iterations at most; inertia is the mean squared distance",
    ),
    Race(
        name="cluster-balanced",
        step="the same against balanced k-means, on a size that those can hold: 4,096 x 384, m = 64",
        sides={
            "mode": _timed(_ours, OURS, SMALL),
            **({KERNELMACHINE: _timed(_kernelmachine, "kmeans_pytorch", SMALL)} if CHECKOUT in os.environ else {}),
            HUNGARIAN: _timed(_hungarian, "scipy.optimize", SMALL),
            FAISS: _timed(_faiss, "faiss", SMALL),
        },
        targets=(
            Target("at least 50x the balanced peer", faster("mode", KERNELMACHINE), 50.0),
            Target(EXACT, figure("mode", "inertia", over=HUNGARIAN), 1.03, at_most=True),
        ),
        make=partial(_make, sizes=SMALL, random_seed=1),
        inputs="cluster-small",
        notes=(
            "kernelmachine's clusters are all of mean size; the Hungarian method finds the best assignment at the same"
            f" 1.1; the former needs a checkout, named by the environment variable {CHECKOUT}"
        ),
    ),
    _disk_race(4_000, 16, 16, ("quick",)),
    *(_disk_race(millions * 1_000_000, 384, 1_024, ("full", "large")) for millions in (1, 3, 10)),
)
