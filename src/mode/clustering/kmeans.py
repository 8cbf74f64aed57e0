"""Balanced k-means over more vectors than memory holds."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from mode.clustering.rows import NearestCentre, Rows
from mode.progress import Progress

#: Vectors per cluster on which the first iterations run; all vectors only have to correct what those found.
WARM_UP_PER_CLUSTER = 32
#: Lloyd stops when an iteration lowers the sum of squared distances by less than this share ...
TOLERANCE = 1e-3
#: ... and less than this share of the points is above the capacity.
OVERFLOW = 1e-2
#: How far a price goes towards the value that would be right if no other price moved.
DAMPING = 0.5
#: Points that prices are computed from, at most; more are thinned out evenly.
PRICE_POINTS = 2_000_000
#: A cluster of this many times the capacity gets another centre.
RELOCATE_ABOVE = 1.25
#: Clusters with room that are tried for a point at once.
CANDIDATES = 32


@dataclass(frozen=True)
class KMeansFit:
    """What `balanced_kmeans` found.

    Attributes:
        centres: float32 [k, d], means of the clusters.
        labels: int32 [points], cluster of each point; no cluster is larger than the capacity.
        sizes: int64 [k], points of each cluster.
        inertia: sum of squared distances of the points to the centres of their clusters.
        iterations: passes over all points.
    """

    centres: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    inertia: float
    iterations: int


def capacity_of(points: int, clusters: int, balance: float) -> int:
    """Points that a cluster may hold: `balance` times the mean, and always enough for all points to find room."""
    return max(math.ceil(points / clusters), math.floor(balance * points / clusters))


def balanced_kmeans(
    rows: Rows,
    clusters: int,
    balance: float,
    iterations: int,
    random_seed: int,
    restarts: int = 1,
    progress: Progress | None = None,
) -> KMeansFit:
    """k-means in which no cluster holds more than `balance` times the mean.

    Lloyd's algorithm, in which each cluster has a price that is added to the squared distance of a point to its centre:
    the price of a cluster that is too large rises, that of one too small falls. These are the dual variables of the
    balanced assignment problem (Bertsekas' auction; Bradley, Bennett, Demiriz 2000), so that a price for each cluster
    is all it takes to balance many points, and an iteration costs as much as one of plain k-means. What the prices
    leave above the capacity moves to the next best cluster with room, the points first that lose least.

    Exact duplicates that would fill clusters by themselves get clusters of their own, for no price can part equal
    points. First iterations run on a sample. No cluster is left empty. The same seed gives the same result on CPU.

    Args:
        rows: N points.
        clusters: k, at most N.
        balance: the largest cluster, as a multiple of the mean, at least 1.
        iterations: of Lloyd's algorithm, at most; one more pass assigns the points.
        random_seed: of the initial centres.
        restarts: fits from different initial centres, of which the best is taken.
        progress: told of each pass.
    """
    fits = [
        _fit(rows, clusters, balance, iterations, np.random.default_rng([random_seed, restart]), progress)
        for restart in range(restarts)
    ]
    return min(fits, key=lambda fit: fit.inertia)


def _fit(
    rows: Rows, clusters: int, balance: float, iterations: int, random: np.random.Generator, progress: Progress | None
) -> KMeansFit:
    capacity = capacity_of(len(rows), clusters, balance)
    labels = _duplicates_with_own_clusters(rows, clusters, random)
    taken = int(labels.max()) + 1
    if not taken:
        return _lloyd(rows, clusters, capacity, iterations, random, progress)
    centres = np.empty((clusters, rows.dimensions), dtype=np.float32)
    _, first = np.unique(labels[labels >= 0], return_index=True)
    centres[:taken] = rows.take(np.flatnonzero(labels >= 0)[first])[:, :-1]
    inertia, passes = 0.0, 1
    if taken < clusters:
        rest = np.flatnonzero(labels < 0)
        fit = _lloyd(rows.subset(rest), clusters - taken, capacity, iterations, random, progress)
        labels[rest], centres[taken:] = fit.labels + taken, fit.centres
        inertia, passes = fit.inertia, fit.iterations
    return KMeansFit(centres, labels, np.bincount(labels, minlength=clusters), inertia, passes)


def _duplicates_with_own_clusters(rows: Rows, clusters: int, random: np.random.Generator) -> np.ndarray:
    """Equal points in such numbers that they fill clusters of mean size: int32 [points], -1 for all others.

    They are looked for in a sample, in which so frequent a point has dozens of copies.
    """
    own = np.full(len(rows), -1, dtype=np.int32)
    if clusters == 1:
        return own
    chunk = math.ceil(len(rows) / clusters)
    sample = rows.sample(2 * WARM_UP_PER_CLUSTER * clusters, random)
    values, counts = np.unique(_as_keys(rows.take(sample)), return_counts=True)
    expected_copies = chunk * len(sample) / len(rows)
    frequent = np.sort(values[counts >= max(2, expected_copies / 2)])
    if not len(frequent):
        return own
    value_of = np.full(len(rows), -1, dtype=np.int32)
    for which, block in rows.blocks():
        keys = _as_keys(block)
        at = np.minimum(np.searchsorted(frequent, keys), len(frequent) - 1)
        value_of[which] = np.where(frequent[at] == keys, at, -1)
    taken, left = 0, len(rows)
    for value in range(len(frequent)):
        copies = np.flatnonzero(value_of == value)
        # A cluster of its own as long as the others still find a point for each cluster that is left.
        while len(copies) >= chunk and left - chunk >= clusters - taken - 1:
            own[copies[:chunk]] = taken
            copies, taken, left = copies[chunk:], taken + 1, left - chunk
    return own


def _as_keys(block: np.ndarray) -> np.ndarray:
    """Rows as scalars that are equal if and only if the rows are."""
    # Adding zero turns -0.0 into 0.0, which has other bytes.
    whole = np.ascontiguousarray(block + 0.0)
    return whole.view(np.dtype((np.void, whole.shape[1] * whole.itemsize))).ravel()


def _lloyd(
    rows: Rows, clusters: int, capacity: int, iterations: int, random: np.random.Generator, progress: Progress | None
) -> KMeansFit:
    """Balanced k-means of points of which no value fills a cluster by itself."""
    state = _start(rows, clusters, random)
    warm_up = WARM_UP_PER_CLUSTER * clusters
    if len(rows) > 2 * warm_up:
        sample = Rows(rows.take(rows.sample(warm_up, random))[:, :-1], block=rows.block)
        _iterate(sample, state, capacity * len(sample) / len(rows), iterations // 2, random)
    done = _iterate(rows, state, capacity, iterations, random, progress)
    assigned = _assign(rows, state)
    _enforce_capacity(rows, assigned, state, capacity)
    _fill_empty(rows, assigned)
    centres = _means(assigned, state.centres)
    return KMeansFit(centres, assigned.labels, assigned.sizes, _inertia(assigned, centres), done + 1)


@dataclass
class _State:
    """What an iteration improves."""

    centres: np.ndarray  # float32 [k, d]
    prices: np.ndarray  # float64 [k], at least 0


@dataclass
class _Assigned:
    """What a pass over the points gives."""

    labels: np.ndarray  # int32 [N], the best cluster of each point
    second: np.ndarray  # int32 [N], the second best
    regret: np.ndarray  # float32 [N], how much worse that is, in squared distance plus price
    sizes: np.ndarray  # int64 [k]
    sums: np.ndarray  # float64 [k, d], of the points of each cluster
    squares: float  # sum of the squared lengths of all points


def _start(rows: Rows, clusters: int, random: np.random.Generator) -> _State:
    """Random points as centres, distinct ones as far as there are any, and no prices."""
    sample = rows.take(rows.sample(8 * clusters, random))[:, :-1]
    order = random.permutation(len(sample))
    _, first = np.unique(_as_keys(sample[order]), return_index=True)
    is_first = np.zeros(len(order), dtype=bool)
    is_first[first] = True
    distinct_first = np.concatenate([order[is_first], order[~is_first]])
    return _State(sample[distinct_first[:clusters]], np.zeros(clusters))


def _iterate(
    rows: Rows,
    state: _State,
    capacity: float,
    iterations: int,
    random: np.random.Generator,
    progress: Progress | None = None,
) -> int:
    """Lloyd's iterations with prices, until neither centres nor balance get better; how many there were."""
    before = math.inf
    for iteration in range(iterations):
        assigned = _assign(rows, state)
        state.centres = _means(assigned, state.centres)
        inertia = _inertia(assigned, state.centres)
        overflow = float(np.maximum(assigned.sizes - capacity, 0).sum()) / len(rows)
        if progress:
            progress.update(1, mean_squared_distance=inertia / len(rows), overflow=overflow)
        if overflow < OVERFLOW and inertia > (1 - TOLERANCE) * before:
            return iteration + 1
        before = inertia
        _update_prices(assigned, state, capacity)
        # Centres that jump until the end would leave clusters that have not settled.
        if iteration < iterations // 2:
            _relocate(assigned, state, capacity, random)
    return iterations


def _assign(rows: Rows, state: _State) -> _Assigned:
    """One pass: each point to the cluster with the smallest squared distance plus price."""
    clusters = len(state.centres)
    labels, second = np.empty(len(rows), dtype=np.int32), np.empty(len(rows), dtype=np.int32)
    regret = np.empty(len(rows), dtype=np.float32)
    sums, squares = np.zeros((clusters, rows.dimensions)), 0.0
    nearest = NearestCentre(state.centres, state.prices)
    for which, block in rows.blocks():
        costs, numbers = nearest.search(block, min(2, clusters))
        labels[which], second[which] = numbers[:, 0], numbers[:, -1]
        regret[which] = costs[:, -1] - costs[:, 0]
        sums += _sum_by_label(block, labels[which], clusters)
        squares += float(np.vdot(block, block))
    return _Assigned(labels, second, regret, np.bincount(labels, minlength=clusters), sums, squares)


def _sum_by_label(block: np.ndarray, labels: np.ndarray, clusters: int) -> np.ndarray:
    """Sum of the rows of each label, [clusters, d], as a product with a sparse 0/1 matrix."""
    ones, ends = np.ones(len(block), dtype=np.float32), np.arange(len(block) + 1)
    members = csr_matrix((ones, labels, ends), shape=(len(block), clusters))
    sums: np.ndarray = (members.T.tocsr() @ block)[:, :-1]
    return sums


def _means(assigned: _Assigned, centres: np.ndarray) -> np.ndarray:
    """Means of the clusters, float32; the old centre of an empty one."""
    counts = np.maximum(assigned.sizes, 1)[:, None]
    return np.where(assigned.sizes[:, None] > 0, assigned.sums / counts, centres).astype(np.float32)


def _inertia(assigned: _Assigned, means: np.ndarray) -> float:
    """Sum of squared distances to the means: sum |x|^2 - sum n_c |mean_c|^2."""
    return max(0.0, assigned.squares - float(assigned.sizes @ np.square(means, dtype=np.float64).sum(axis=1)))


def _update_prices(assigned: _Assigned, state: _State, capacity: float) -> None:
    """Raise the price of overfull clusters and lower that of others that have one.

    A cluster with e points too many loses just these if its price rises by the e-th smallest regret of its points; one
    with e too few gains them if its price falls by the e-th smallest regret of the points to which it is second best.
    As its neighbours move too, it goes half the way. Prices never fall below 0: only being too large is wrong, and a
    small cluster far from all others must not swallow one of those.
    """
    every = math.ceil(len(assigned.labels) / PRICE_POINTS)
    aim = (capacity + len(assigned.labels) / len(state.centres)) / 2
    excess = (assigned.sizes - aim) / every
    rise = nth_regret(assigned.labels[::every], assigned.regret[::every], excess)
    fall = nth_regret(assigned.second[::every], assigned.regret[::every], -excess)
    state.prices = np.maximum(0.0, state.prices + DAMPING * np.where(excess > 0, rise, -fall))


def nth_regret(clusters: np.ndarray, regret: np.ndarray, nth: np.ndarray) -> np.ndarray:
    """For each cluster the `nth` smallest (from 1, rounded up) of the regrets given for it; 0 if none is given.

    Cluster and regret are sorted as one number, in a third of the time of sorting by two keys: floats of one sign have
    the order of their bits.

    Args: clusters int32 [n]; regret float32 [n], at least 0; nth [k]. Returns float32 [k].
    """
    keys = clusters.astype(np.uint64) << 32 | np.abs(regret).view(np.uint32)  # `abs` because -0.0 has the sign's bit
    keys.sort()
    count = np.bincount(clusters, minlength=len(nth))
    at = np.cumsum(count) - count + np.clip(np.ceil(nth).astype(np.int64), 1, np.maximum(count, 1)) - 1
    found = keys[np.minimum(at, len(keys) - 1)].astype(np.uint32).view(np.float32)
    return np.where(count > 0, found, np.float32(0))


def _relocate(assigned: _Assigned, state: _State, capacity: float, random: np.random.Generator) -> None:
    """Move centres of the smallest clusters into far too large ones, where prices would only push points far away.

    It pays where the points that lose their centre are fewer than half of those that find room. Empty clusters come
    first, so none stays empty beside a large one.
    """
    sizes = assigned.sizes.astype(np.float64)
    too_large = [(-size, cluster) for cluster, size in enumerate(sizes) if size > RELOCATE_ABOVE * capacity]
    heapq.heapify(too_large)
    jitter = np.sqrt(np.square(state.centres, dtype=np.float64).mean()) / 256
    for donor in np.argsort(sizes, kind="stable"):
        if not too_large or sizes[donor] >= (-too_large[0][0] - capacity) / 2:
            break
        size, largest = heapq.heappop(too_large)
        aside = (jitter * random.choice([-1.0, 1.0], state.centres.shape[1])).astype(np.float32)
        state.centres[donor] = state.centres[largest] + aside
        state.centres[largest] -= aside
        state.prices[donor] = state.prices[largest]
        for half in (int(donor), largest):
            sizes[half] = -size / 2
            if sizes[half] > RELOCATE_ABOVE * capacity:
                heapq.heappush(too_large, (size / 2, half))


def _enforce_capacity(rows: Rows, assigned: _Assigned, state: _State, capacity: int) -> None:
    """Move points out of clusters above the capacity into the next best ones with room, those first that lose least."""
    room = np.maximum(capacity - assigned.sizes, 0)
    homeless = _overflow(assigned, capacity)
    while len(homeless):
        open_clusters = np.flatnonzero(room)
        nearest = NearestCentre(state.centres[open_clusters], state.prices[open_clusters])
        left = []
        for start in range(0, len(homeless), rows.block):
            points = homeless[start : start + rows.block]
            block = rows.take(points)
            costs, numbers = nearest.search(block, min(CANDIDATES, len(open_clusters)))
            new = place(costs, open_clusters[numbers], room)
            _move(assigned, points[new >= 0], block[new >= 0, :-1], new[new >= 0])
            left.append(points[new < 0])
        homeless = np.concatenate(left)


def _overflow(assigned: _Assigned, capacity: int) -> np.ndarray:
    """The points with the smallest regret in each cluster above the capacity, as many as it is above; ascending."""
    members = np.flatnonzero(assigned.sizes[assigned.labels] > capacity)
    labels = assigned.labels[members]
    order = members[np.lexsort((assigned.regret[members], labels))]
    surplus = (assigned.sizes - capacity)[assigned.labels[order]]
    return np.sort(order[_rank_in_group(assigned.labels[order]) < surplus])


def _rank_in_group(sorted_groups: np.ndarray) -> np.ndarray:
    """How many entries of the same group come before each entry; equal groups lie together."""
    position = np.arange(len(sorted_groups))
    is_first = np.ones(len(sorted_groups), dtype=bool)
    is_first[1:] = sorted_groups[1:] != sorted_groups[:-1]
    return position - np.maximum.accumulate(np.where(is_first, position, 0))


def place(costs: np.ndarray, candidates: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Give each point the first of its candidates that still has room, the cheapest points first; -1 for none.

    Args:
        costs, candidates: [points, count], cheapest candidate first.
        room: places of each cluster; those given away are subtracted.
    """
    placed = np.full(len(costs), -1, dtype=np.int64)
    for column in range(costs.shape[1]):
        waiting = np.flatnonzero(placed < 0)
        wanted = candidates[waiting, column]
        order = np.lexsort((costs[waiting, column], wanted))
        accepted = _rank_in_group(wanted[order]) < room[wanted[order]]
        placed[waiting[order[accepted]]] = wanted[order[accepted]]
        room -= np.bincount(wanted[order[accepted]], minlength=len(room))
    return placed


def _move(assigned: _Assigned, points: np.ndarray, vectors: np.ndarray, new: np.ndarray) -> None:
    """Move points to other clusters, and their vectors from sum to sum."""
    old = assigned.labels[points]
    np.subtract.at(assigned.sums, old, vectors)
    np.add.at(assigned.sums, new, vectors)
    assigned.labels[points] = new
    clusters = len(assigned.sizes)
    assigned.sizes += np.bincount(new, minlength=clusters) - np.bincount(old, minlength=clusters)


def _fill_empty(rows: Rows, assigned: _Assigned) -> None:
    """Give each empty cluster the point of the largest cluster that is farthest from that one's mean."""
    for empty in np.flatnonzero(assigned.sizes == 0):
        largest = int(assigned.sizes.argmax())
        members = np.flatnonzero(assigned.labels == largest)
        block = rows.take(members)[:, :-1]
        distances = np.linalg.norm(block - assigned.sums[largest] / len(members), axis=1)
        farthest = int(distances.argmax())
        _move(assigned, members[[farthest]], block[[farthest]], np.array([empty]))
