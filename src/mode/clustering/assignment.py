"""Every pair to its nearest fine centre, hence to one coarse cluster and one data expert."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from mode.clustering.hierarchy import Clusters, random_clusters
from mode.clustering.nearest import NearestCentre
from mode.clustering.rows import BLOCK, Rows
from mode.data.files import write_aside
from mode.errors import ModeError
from mode.progress import Progress

#: Share of a vector's squared length below which |x|^2 - 2xc + |c|^2 has lost digits, and |x - c|^2 is computed anew.
CANCELLATION = 1e-2


@dataclass(frozen=True)
class Assignment:
    """One entry per pair, in the order of the index.

    Attributes:
        fine: int32 [N].
        coarse: int32 [N].
        distance: float32 [N], Euclidean, to the fine centre (of `random` clusters: to the mean of the pair's cluster).
    """

    fine: np.ndarray
    coarse: np.ndarray
    distance: np.ndarray

    def __len__(self) -> int:
        return len(self.fine)

    def save(self, path: Path) -> None:
        """Write parquet with columns `pair` (row of the index), `fine`, `coarse`, `distance`."""
        columns = {"fine": self.fine, "coarse": self.coarse, "distance": self.distance}
        with write_aside(path) as aside:
            parquet.write_table(pa.table({"pair": np.arange(len(self)), **columns}), aside)

    @classmethod
    def load(cls, path: Path) -> Assignment:
        """Read what `save` wrote. Raises `ModeError` where there is none."""
        try:
            table = parquet.read_table(path, columns=["fine", "coarse", "distance"])
        except FileNotFoundError:
            raise ModeError(f"{path}: no such file", "run the assignment stage") from None
        return cls(*(table[name].to_numpy() for name in ("fine", "coarse", "distance")))


def assign(vectors: np.ndarray, clusters: Clusters, block: int = BLOCK) -> Assignment:
    """The nearest fine centre of every vector: exact up to float32 rounding, in constant memory but for the result.

    Args:
        vectors: float16 or float32 [N, d], in memory or memory-mapped.
        clusters: m centres of d dimensions.
        block: vectors searched together.

    Raises:
        ModeError: vectors and centres differ in their dimensions.
    """
    rows = Rows(vectors)
    if rows.dimensions != clusters.fine_centres.shape[1]:
        raise ModeError(
            f"assignment: vectors of {rows.dimensions} dimensions, centres of {clusters.fine_centres.shape[1]}",
            "embed and cluster again with the same embedder",
        )
    fine = np.empty(len(rows), dtype=np.int32)
    distance = np.empty(len(rows), dtype=np.float32)
    is_random = clusters.strategy == "random"
    if is_random:
        fine[:] = random_clusters(np.arange(len(rows)), clusters.coarse, clusters.seed)
    nearest = NearestCentre(clusters.fine_centres)
    with Progress("assign", total=len(rows), unit="pairs") as bar:
        for which, points in rows.blocks(block):
            if is_random:
                distance[which] = _distances(points, clusters.fine_centres[fine[which]])
            else:
                squared, numbers = nearest.search(points)
                fine[which] = numbers[:, 0]
                distance[which] = _refined(squared[:, 0], points, clusters.fine_centres, fine[which])
            bar.update(len(points))
    return Assignment(fine, clusters.coarse_of_fine[fine], distance)


def _refined(squared: np.ndarray, points: np.ndarray, centres: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Distances, computed from the difference itself where the search's formula cancels."""
    distance: np.ndarray = np.sqrt(squared)
    lengths = np.einsum("bd,bd->b", points, points)
    close = np.flatnonzero(squared <= CANCELLATION * lengths)
    distance[close] = _distances(points[close], centres[fine[close]])
    return distance


def _distances(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Euclidean distance of each point (as `Rows` gives it) to the centre beside it."""
    distances: np.ndarray = np.linalg.norm(points[:, :-1] - centres, axis=1)
    return distances
