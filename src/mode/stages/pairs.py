"""Which pairs a model is trained on, and the files beside its checkpoint that say so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mode.errors import ModeError
from mode.roles import Role
from mode.stages.machine import made_by_one
from mode.stages.project import Project

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mode.data.loading.selection import Pairs
    from mode.data.shards.index import PairIndex
    from mode.params import ExpertParams, UpdateParams

#: Gives pairs of a source, a cluster and a share of the pairs outside it, in blocks: `seen_rows`, `left_rows`.
_RowsOf = Callable[["Project", str, int, float], "Iterator[NDArray[np.int64]]"]


def pairs_of(project: Project, role: Role, key: str | None, index: PairIndex) -> Pairs:
    """The pairs of a training, in files beside its checkpoint that the first process to come writes.

    Under torchrun that is the one that leads; the others wait for it.
    """
    from mode.checksums import SEAL, content_of
    from mode.data.loading.selection import Pairs, every_row, write_pairs

    params = project.params
    held_out, random_seed = params.training.held_out, params.random_seed
    made_from: dict[str, object] = {"held_out": held_out, "random_seed": random_seed, "index": content_of(index.folder)}
    if role.pairs == "cluster" and key is not None:
        rows = rows_of_expert(project, key, index)
        expert = project.expert(key)
        assignment = SEAL.digest_of(project.assignment(expert.source))
        made_from |= {"cluster": expert.cluster, "share": outside_share(project, expert), "assignment": assignment}
    else:
        rows = every_row(len(index))
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    folder = project.pairs(role.model(key), digest)
    made_by_one(lambda: write_pairs(folder, index, rows, held_out, random_seed), folder)
    return Pairs.open(folder)


def rows_of_expert(project: Project, name: str, index: PairIndex) -> Iterator[NDArray[np.int64]]:
    """The pairs that an expert sees, were none held out, in blocks.

    Raises:
        ModeError: the assignment is of another index, whose rows are other pairs; or, when blocks are asked for, the
            cluster is empty.
    """
    params = project.expert(name)
    return _rows_of_cluster(project, params.source, params.cluster, outside_share(project, params), index)


def seen_rows(project: Project, source: str, cluster: int, outside_share: float) -> Iterator[NDArray[np.int64]]:
    """The pairs of a source that an expert of a cluster is trained on, without those of held-out images, in blocks."""
    from mode.data.loading.selection import without_held_out

    params, index = project.params, project.load_index(source)
    rows = _rows_of_cluster(project, source, cluster, outside_share, index)
    return without_held_out(rows, index, params.training.held_out, params.random_seed)


def left_rows(project: Project, source: str, cluster: int, outside_share: float) -> Iterator[NDArray[np.int64]]:
    """Those of held-out images alone, which it would be trained on as well, were none held out."""
    from mode.data.loading.selection import only_held_out

    params, index = project.params, project.load_index(source)
    rows = _rows_of_cluster(project, source, cluster, outside_share, index)
    return only_held_out(rows, index, params.training.held_out, params.random_seed)


def outside_share(project: Project, trained: ExpertParams | UpdateParams) -> float:
    """Of the pairs outside its cluster, the share that an expert, or an update of one, sees."""
    own = trained.outside_share
    return project.params.branch.outside_share if own is None else own


def open_joined(project: Project, key: str) -> tuple[PairIndex, Pairs]:
    """Index and pairs of an update, in files beside its checkpoint that the first process to come writes."""
    from mode.checksums import SEAL, content_of
    from mode.data.loading.selection import Pairs, every_row, write_pairs
    from mode.data.shards.index import PairIndex

    params, update = project.params, project.update(key)
    sources = (update.replays, update.source)
    made_from: dict[str, object] = {
        "held_out": params.training.held_out,
        "random_seed": params.random_seed,
        "cluster": update.cluster,
        "share": outside_share(project, update),
        "replay_share": update.replay_share,
        "indexes": [content_of(project.index(source)) for source in sources],
        "assignments": [SEAL.digest_of(project.assignment(source)) for source in sources],
        "beside": "held-out pairs of both",
    }
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    joined, folder = project.joined_index(key, digest), project.pairs(key, digest)

    def make() -> None:
        trained = join_update(project, key, joined)
        index = PairIndex.load(joined)
        beside = (trained + block for block in every_row(len(index) - trained))
        # Which images are held out, only their own source says.
        write_pairs(folder, index, every_row(trained), held_out=0, random_seed=params.random_seed, beside=beside)

    made_by_one(make, joined, folder)
    return PairIndex.load(joined), Pairs.open(folder)


def join_update(project: Project, key: str, out: Path) -> int:
    """Write an index of the pairs of an update: some that the expert was trained on, then those that are new.

    After them come, in the same proportion, the pairs of held-out images, which nothing is trained on.

    Returns:
        How many come before those of held-out images.

    Raises:
        ModeError: none is new, or as `rows_of_cluster`.
    """
    from mode.data.loading.selection import some_rows
    from mode.data.shards.join import join_indexes

    update = project.update(key)
    share = outside_share(project, update)
    if not any((block == update.cluster).any() for block in _coarse_blocks(project, update.source)):
        advice = f"`mode remove-expert {key}` takes it out again"
        raise ModeError(f"{key}: no pair of '{update.source}' is in cluster {update.cluster}", advice)
    old_index, new_index = project.load_index(update.replays), project.load_index(update.source)
    parts, counts = [], []
    for rows_of in (seen_rows, left_rows):
        again, new = _of_update(project, key, rows_of)
        counts.append(again + new)
        if not new and rows_of is seen_rows:
            advice = "a smaller training.held_out"
            raise ModeError(f"{key}: all new pairs of cluster {update.cluster} are held out", advice)
        before = partial(rows_of, project, update.replays, update.cluster, share)
        parts += [
            (old_index, some_rows(before, again, project.params.random_seed)),
            (new_index, rows_of(project, update.source, update.cluster, share)),
        ]
    join_indexes(out, parts)
    return counts[0]


def _of_update(project: Project, key: str, rows_of: _RowsOf) -> tuple[int, int]:
    """How many pairs of an update are old, as `replay_share` says if there are so many, and how many new."""
    update = project.update(key)
    share = outside_share(project, update)
    old, new = (
        sum(len(rows) for rows in rows_of(project, source, update.cluster, share))
        for source in (update.replays, update.source)
    )
    return min(old, round(new * update.replay_share / (1 - update.replay_share))), new


def _rows_of_cluster(
    project: Project, source: str, cluster: int, outside_share: float, index: PairIndex
) -> Iterator[NDArray[np.int64]]:
    from mode.data.loading.selection import expert_rows

    _check_assignment(project, source, index)
    coarse = partial(_coarse_blocks, project, source)
    return expert_rows(coarse, cluster, outside_share, project.params.random_seed)


def _coarse_blocks(project: Project, source: str) -> Iterator[NDArray[np.int32]]:
    from mode.clustering.assignment import Assignment

    return Assignment.coarse_blocks(project.assignment(source))


def _check_assignment(project: Project, source: str, index: PairIndex) -> None:
    """Refuse an assignment of another index, whose rows are other pairs."""
    from mode.checksums import identity_of
    from mode.clustering.assignment import Assignment

    path = project.assignment(source)
    of, present = Assignment.origin(path).get("index"), identity_of(index.folder)
    if Assignment.pairs(path) != len(index) or (of and present and of != present):
        raise ModeError(f"{path}: of another index than {index.folder}", "embed and assign again")
