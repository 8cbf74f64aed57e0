"""Every pair to its nearest fine centre, hence to one coarse cluster and one data expert."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from mode.checksums import content_of
from mode.clustering.hierarchy import Clusters, random_clusters
from mode.clustering.rows import BLOCK, NearestCentre, Rows
from mode.engine import Engine, in_this_process
from mode.errors import ModeError
from mode.files import is_there, write_aside
from mode.progress import Progress
from mode.sealed_parquet import facts_of, iter_sealed, read_sealed, rows_of, write_sealed
from mode.vectors import load_vectors, origin_of

#: Share of a vector's squared length below which |x|^2 - 2xc + |c|^2 has lost digits, and |x - c|^2 is computed anew.
CANCELLATION = 1e-2
#: Columns of the parquet file: row of the index, and what `Assignment` has.
SCHEMA = pa.schema([("pair", pa.int64()), ("fine", pa.int32()), ("coarse", pa.int32()), ("distance", pa.float32())])
#: Name of what the file says of where the vectors came from.
_ORIGIN = "mode.origin"
#: Rows of a parquet row group: what `assign_file` holds back before it writes.
ROW_GROUP = 1 << 20


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
        """Write a parquet file of the columns of `SCHEMA`."""
        with write_aside(path) as aside, write_sealed(aside, SCHEMA) as writer:
            writer.write_table(self.table(), row_group_size=ROW_GROUP)

    def table(self, first: int = 0) -> pa.Table:
        """The columns of `SCHEMA`, for an assignment that begins with the pair `first`."""
        pairs = np.arange(first, first + len(self), dtype=np.int64)
        return pa.table([pairs, self.fine, self.coarse, self.distance], schema=SCHEMA)

    @classmethod
    def load(cls, path: Path) -> Assignment:
        """Read what `save` wrote. Raises `ModeError` where there is none, or a damaged one."""
        is_there(path)
        table = read_sealed(path, ["fine", "coarse", "distance"])
        return cls(*(table[name].to_numpy() for name in ("fine", "coarse", "distance")))

    @classmethod
    def blocks(cls, path: Path) -> Iterator[Assignment]:
        """The same, so many pairs at a time that memory does not grow with their number. Raises as `load`."""
        is_there(path)
        for part in iter_sealed(path, ["fine", "coarse", "distance"], BLOCK):
            yield cls(*(part[name].to_numpy() for name in ("fine", "coarse", "distance")))

    @staticmethod
    def coarse_blocks(path: Path) -> Iterator[np.ndarray]:
        """The coarse cluster of every pair, int32, in the blocks of `blocks`. Raises as `load`."""
        is_there(path)
        return (part["coarse"].to_numpy() for part in iter_sealed(path, ["coarse"], BLOCK))

    @staticmethod
    def pairs(path: Path) -> int:
        """How many pairs are assigned, at the cost of reading the file's end. Raises as `load`."""
        is_there(path)
        return rows_of(path)

    @staticmethod
    def origin(path: Path) -> dict[str, str]:
        """What the assigned vectors were made from, as `origin_of` says of them. Raises as `load`."""
        text = facts_of(path).get(_ORIGIN)
        origin: dict[str, str] = json.loads(text) if text else {}
        return origin


def assign(vectors: np.ndarray, clusters: Clusters, block: int = BLOCK, rows: np.ndarray | None = None) -> Assignment:
    """The nearest fine centre of every vector: exact up to float32 rounding, in constant memory but for the result.

    Args:
        vectors: float16 or float32 [N, d], in memory or memory-mapped.
        clusters: m centres of d dimensions.
        block: vectors searched together.
        rows: int64, ascending, the vectors to assign; default all.

    Raises:
        ModeError: vectors and centres differ in their dimensions.
    """
    given = Rows(vectors, rows, block)
    _check_dimensions(given.dimensions, clusters)
    found = Assignment(*(np.empty(len(given), kind) for kind in (np.int32, np.int32, np.float32)))
    search = _Search(clusters)
    with Progress("assign", total=len(given), unit="pairs") as bar:
        for which, points in given.blocks():
            part = search.assign(points, np.arange(which.start, which.stop) if rows is None else rows[which])
            found.fine[which], found.coarse[which], found.distance[which] = part.fine, part.coarse, part.distance
            bar.update(len(points))
    return found


def assign_file(vectors: Path, clusters: Path, out: Path, engine: Engine = in_this_process, block: int = BLOCK) -> None:
    """As `assign`, from file to file, in constant memory; the file is the one that `Assignment.save` writes.

    Args:
        vectors: `.npy` file, float16 or float32 [N, d].
        clusters: the folder of m centres.
        out: the parquet file to write, as a whole or not at all.
        engine: where blocks are searched (see `mode.engine`); its workers read `vectors` and `clusters` by these paths.
        block: vectors searched together.

    Raises:
        ModeError: vectors and centres differ in their dimensions, or were made with different embedders; a vector is
            damaged; or a worker sees other files than this process.
    """
    pairs, dimensions = load_vectors(vectors).shape
    opened, origin = Clusters.load(clusters), origin_of(vectors)
    _check_dimensions(dimensions, opened)
    same_embedder(vectors, origin, clusters, opened.origin)
    look = _StoredSearch(vectors, (pairs, dimensions), clusters, content_of(clusters), block)
    facts = {_ORIGIN: json.dumps(origin, sort_keys=True)} if origin else {}
    waiting = SCHEMA.empty_table()
    with (
        write_aside(out) as aside,
        Progress("assign", total=pairs, unit="pairs") as bar,
        write_sealed(aside, SCHEMA, facts) as writer,
    ):
        for part in engine(look, range(0, pairs, block)):
            # In one chunk, as pages end where chunks do.
            waiting = pa.concat_tables([waiting, part.table(first=bar.done)]).combine_chunks()
            bar.update(len(part))
            while len(waiting) >= ROW_GROUP:
                writer.write_table(waiting.slice(0, ROW_GROUP), row_group_size=ROW_GROUP)
                waiting = waiting.slice(ROW_GROUP)
        if len(waiting) or not pairs:
            writer.write_table(waiting)


def same_embedder(one: Path, of_one: Mapping[str, str], other: Path, of_other: Mapping[str, str]) -> None:
    """Refuse files that were made with different embedders, as far as they say; their distances mean nothing.

    Args:
        one, other: two of vectors, clusters, assignment and embedder, for the message.
        of_one, of_other: what they were made from, see `mode.vectors.origin_of`.

    Raises:
        ModeError: the embedders differ.
    """
    if len({of_one.get("embedder"), of_other.get("embedder")} - {None}) > 1:
        raise ModeError(f"{one} and {other} come from different embedders", "embed, cluster and assign again")


@dataclass(frozen=True)
class _StoredSearch:
    """What finds the nearest centres of a block, wherever it is sent to: it goes by paths."""

    vectors: Path  # a file
    shape: tuple[int, int]  # of what it has to hold
    clusters: Path  # a folder
    content: str  # the digest of what it has to hold
    block: int  # rows

    def __call__(self, first: int) -> Assignment:
        vectors = load_vectors(self.vectors)
        if vectors.shape != self.shape:
            raise ModeError(f"{self.vectors}: another file on a worker", "all workers have to see the project folder")
        rows = Rows(vectors[first : first + self.block], block=self.block, first=first)
        (_, points), *_ = rows.blocks()
        return _opened(self.clusters, self.content).assign(points, np.arange(first, first + len(points)))


@lru_cache(maxsize=1)
def _opened(folder: Path, content: str) -> _Search:
    """Once in a process."""
    clusters = Clusters.load(folder)
    if content_of(folder) != content:
        raise ModeError(f"{folder}: other clusters on a worker", "all workers have to see the project folder")
    return _Search(clusters)


class _Search:
    """Nearest centres of blocks."""

    def __init__(self, clusters: Clusters) -> None:
        self._clusters, self._nearest = clusters, NearestCentre(clusters.fine_centres)

    def assign(self, points: np.ndarray, rows: np.ndarray) -> Assignment:
        """The assignment of a block as `Rows` gives it, of these rows."""
        clusters = self._clusters
        if clusters.strategy == "random":
            fine = random_clusters(rows, clusters.coarse, clusters.random_seed)
            distance = _distances(points, clusters.fine_centres[fine])
        else:
            squared, numbers = self._nearest.search(points)
            fine = numbers[:, 0].astype(np.int32)
            distance = _refined(squared[:, 0], points, clusters.fine_centres, fine)
        return Assignment(fine, clusters.coarse_of_fine[fine], distance)


def _check_dimensions(dimensions: int, clusters: Clusters) -> None:
    if dimensions != clusters.fine_centres.shape[1]:
        raise ModeError(
            f"assignment: vectors of {dimensions} dimensions, centres of {clusters.fine_centres.shape[1]}",
            "embed and cluster again with the same embedder",
        )


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
