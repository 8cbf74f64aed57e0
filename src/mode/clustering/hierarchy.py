"""Fine and coarse clusters: what a data expert is trained on, and what its condition is (paper, section 3.2)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mode.checksums import ADVICE, check_manifest, write_manifest
from mode.clustering.kmeans import KMeansFit, balanced_kmeans
from mode.clustering.rows import Rows
from mode.errors import ModeError, in_one_line
from mode.files import is_there, write_aside
from mode.params import ClusteringParams
from mode.permutation import GOLDEN, mix, permuted
from mode.progress import Progress

#: Fits of the coarse clusters, which cost next to nothing, of which the best is taken.
COARSE_RESTARTS = 16
#: Chosen vectors are copied out of their file if they are no larger than this, in bytes.
COPY_BELOW = 1 << 30
#: Keeps the draw of the fitted vectors apart from others with the same seed.
_SAMPLE = 1_000_117

_ARRAYS = ("fine_centres", "coarse_of_fine", "coarse_centres", "fine_sizes", "coarse_sizes")


@dataclass(frozen=True)
class Clusters:
    """m fine and n coarse clusters.

    Coarse clusters are numbered by size, the largest first, and fine ones by coarse cluster, then by size. Of `targets`
    coarse cluster 0 is the targets', 1 the rest.

    Attributes:
        fine_centres: float32 [m, d].
        coarse_of_fine: int32 [m].
        coarse_centres: float32 [n, d], means of the fine centres.
        fine_sizes: int64 [m], fitted vectors in each.
        coarse_sizes: int64 [n].
        strategy: `two-level`, `one-step` (m = n, each fine cluster is a coarse one), `random` (as one-step, but the
            cluster of a pair is a hash of its row) or `targets`.
        random_seed: of the fit, and of the hash.
        fine_words, coarse_words: the most telling words of each cluster; empty until `name_clusters`.
        statistics: of the fit: `points` used of `points_given`; `imbalance` (largest fine cluster over the mean),
            `coarse_imbalance`, `empty` fine clusters, `duplicate_centres`, `inertia` (sum of squared distances),
            `iterations`.
        origin: what the fitted vectors were made from, see `mode.vectors.origin_of`.
    """

    fine_centres: np.ndarray
    coarse_of_fine: np.ndarray
    coarse_centres: np.ndarray
    fine_sizes: np.ndarray
    coarse_sizes: np.ndarray
    strategy: str
    random_seed: int
    fine_words: list[list[str]] = field(default_factory=list)
    coarse_words: list[list[str]] = field(default_factory=list)
    statistics: dict[str, float] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    @property
    def fine(self) -> int:
        """Number of fine clusters, m."""
        return len(self.fine_centres)

    @property
    def coarse(self) -> int:
        """Number of coarse clusters, n."""
        return len(self.coarse_centres)

    def condition(self, coarse: int) -> np.ndarray:
        """What an expert is chosen by: the fine centres of its coarse cluster, float32 [k, d]."""
        if not 0 <= coarse < self.coarse:
            raise ModeError(f"coarse cluster {coarse}: there are {self.coarse} (0 to {self.coarse - 1})")
        centres: np.ndarray = self.fine_centres[self.coarse_of_fine == coarse]
        return centres

    def save(self, folder: Path) -> None:
        """Write `clusters.safetensors` (arrays) and `clusters.json` (all else); the folder appears when complete."""
        with write_aside(folder) as aside:
            aside.mkdir()
            arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
            save_file(arrays, aside / "clusters.safetensors")
            record = {"strategy": self.strategy, "seed": self.random_seed}
            record |= {name: getattr(self, name) for name in ("statistics", "origin", "coarse_words", "fine_words")}
            (aside / "clusters.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
            write_manifest(aside)

    @classmethod
    def load(cls, folder: Path) -> Clusters:
        """Read what `save` wrote. Raises `ModeError` where there are no clusters, or damaged ones."""
        if not is_there(folder):
            raise ModeError(f"{folder}: no clusters there", "run the clustering stage")
        check_manifest(folder)
        try:
            record: dict[str, Any] = json.loads((folder / "clusters.json").read_text(encoding="utf-8"))
            arrays = load_file(folder / "clusters.safetensors")
            record["random_seed"] = record.pop("seed")
            clusters = cls(**{name: arrays[name] for name in _ARRAYS}, **record)
        except (FileNotFoundError, NotADirectoryError):
            raise ModeError(f"{folder}: no clusters there", "run the clustering stage") from None
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ModeError(f"{folder}: damaged clusters: {in_one_line(error)}", ADVICE) from None
        return clusters


def fit_clusters(
    vectors: np.ndarray,
    params: ClusteringParams,
    fine: int,
    coarse: int,
    random_seed: int,
    near_targets: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Clusters:
    """Cluster vectors into `fine` clusters and these into `coarse` ones, both balanced.

    Fine clusters are balanced by the vectors fitted on, coarse ones by their number of fine centres (as in the paper);
    of strategy `targets` nothing balances the two coarse ones.

    Args:
        vectors: float16 or float32 [N, d], in memory or memory-mapped.
        params: strategy, balance, sample, iterations.
        fine, coarse: m and n.
        random_seed: of the sample and of initial centres.
        near_targets: of strategy `targets`: fine centres [m, d] -> numbers of those that targets are nearest to.

    Raises:
        ModeError: n > m, fewer vectors than clusters, or no fine cluster that is not near a target.

    Example:
        >>> points = np.repeat(np.eye(4, dtype=np.float32), 8, axis=0)
        >>> fit_clusters(points, ClusteringParams(), fine=4, coarse=2, random_seed=0).fine_sizes.tolist()
        [8, 8, 8, 8]
    """
    if coarse > fine:
        raise ModeError(f"clustering: {coarse} coarse clusters of {fine} fine ones", "lower coarse, or raise fine")
    wanted = fine if params.strategy in ("two-level", "targets") else coarse
    if len(vectors) < wanted:
        raise ModeError(
            f"clustering: {wanted} clusters of {len(vectors)} pairs: each needs at least one",
            "lower clustering.fine and clustering.coarse, or give more pairs",
        )
    rows, numbers = _fitted_rows(vectors, params.sample, wanted, random_seed)
    if params.strategy == "random":
        fit = _random_fit(rows, numbers, coarse, random_seed)
    else:
        with Progress(f"k-means into {wanted}", unit="passes") as bar:
            fit = balanced_kmeans(rows, wanted, params.balance, params.iterations, random_seed, progress=bar)
    if params.strategy == "two-level":
        centres, iterations = Rows(fit.centres), 4 * params.iterations
        upper = balanced_kmeans(centres, coarse, params.balance, iterations, random_seed, COARSE_RESTARTS)
        coarse_of_fine = upper.labels
    elif near_targets:
        coarse_of_fine = np.ones(fine, dtype=np.int32)
        coarse_of_fine[near_targets(fit.centres)] = 0
        if not coarse_of_fine.any():
            raise ModeError(
                f"clustering: all {fine} fine clusters are near a target, and none is left for another expert",
                "more fine clusters, fewer targets, or a smaller clustering.targets_nearest",
            )
    else:
        coarse_of_fine = np.arange(coarse, dtype=np.int32)
    clusters = _numbered(fit, coarse_of_fine, params.strategy, random_seed)
    statistics = {
        "points": len(rows),
        "points_given": len(vectors),
        "inertia": fit.inertia,
        "iterations": fit.iterations,
        "imbalance": float(clusters.fine_sizes.max() / clusters.fine_sizes.mean()),
        "coarse_imbalance": float(clusters.coarse_sizes.max() / clusters.coarse_sizes.mean()),
        "empty": int((clusters.fine_sizes == 0).sum()),
        "duplicate_centres": clusters.fine - len(np.unique(clusters.fine_centres, axis=0)),
    }
    return replace(clusters, statistics=statistics)


def nearest_centres(points: np.ndarray, centres: np.ndarray, count: int) -> np.ndarray:
    """Numbers of the centres that are among the `count` nearest of any point, ascending, int64.

    Args:
        points: [t, d], at least one.
        centres: [m, d].
        count: of each point; all where there are no more.

    Example:
        >>> nearest_centres(np.array([[0.0], [9.0]]), np.array([[1.0], [5.0], [8.0], [2.0]]), 1)
        array([0, 2])
    """
    squared = np.square(centres, dtype=np.float64).sum(axis=1) - 2 * points.astype(np.float64) @ centres.T
    return np.unique(np.argsort(squared, axis=1, kind="stable")[:, :count])


def random_clusters(rows: np.ndarray, clusters: int, random_seed: int) -> np.ndarray:
    """A cluster for each row number that depends on nothing but that number and `random_seed`, int32 [rows]."""
    mixed = mix(rows.astype(np.uint64) + np.uint64((random_seed + 1) * int(GOLDEN) % 2**64))
    return (mixed % np.uint64(clusters)).astype(np.int32)


def _fitted_rows(vectors: np.ndarray, sample: int, wanted: int, random_seed: int) -> tuple[Rows, np.ndarray]:
    """At most `sample` rows (but at least one per cluster), and their numbers."""
    given = Rows(vectors)
    most = max(sample, wanted)
    if len(given) <= most:
        return given, np.arange(len(given), dtype=np.int64)
    numbers = np.sort(permuted(np.arange(most), len(given), random_seed, _SAMPLE))
    rows = given.subset(numbers)
    return (rows.in_memory() if rows.bytes <= COPY_BELOW else rows), numbers


def _random_fit(rows: Rows, numbers: np.ndarray, clusters: int, random_seed: int) -> KMeansFit:
    """Random clusters, with the means of their rows for centres."""
    labels = random_clusters(numbers, clusters, random_seed)
    sizes = np.bincount(labels, minlength=clusters)
    sums, squares = np.zeros((clusters, rows.dimensions)), 0.0
    for which, block in rows.blocks():
        for cluster in range(clusters):
            sums[cluster] += block[labels[which] == cluster, :-1].sum(axis=0, dtype=np.float64)
        squares += float(np.vdot(block, block))
    centres = (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32)
    inertia = max(0.0, squares - float(sizes @ np.square(centres, dtype=np.float64).sum(axis=1)))
    return KMeansFit(centres, labels, sizes, inertia, 1)


def _numbered(fit: KMeansFit, coarse_of_fine: np.ndarray, strategy: str, random_seed: int) -> Clusters:
    """Clusters in an order that does not depend on the initial centres.

    Random ones keep the number of their hash, the targets' is 0.
    """
    coarse = int(coarse_of_fine.max()) + 1
    coarse_sizes = np.bincount(coarse_of_fine, weights=fit.sizes, minlength=coarse).astype(np.int64)
    by_size = np.arange(coarse) if strategy in ("random", "targets") else np.argsort(-coarse_sizes, kind="stable")
    rank = np.argsort(by_size).astype(np.int32)[coarse_of_fine]
    order = np.lexsort((-fit.sizes, rank))
    centres, coarse_of_fine = fit.centres[order], rank[order]
    coarse_centres = np.stack([centres[coarse_of_fine == number].mean(axis=0) for number in range(coarse)])
    return Clusters(
        fine_centres=centres,
        coarse_of_fine=coarse_of_fine,
        coarse_centres=coarse_centres,
        fine_sizes=fit.sizes[order],
        coarse_sizes=coarse_sizes[by_size],
        strategy=strategy,
        random_seed=random_seed,
    )
