"""What DVC knows about the pipeline: its stages, what each needs, and which are not up to date.

A pipeline is a networkx graph as DVC has it, of addresses such as `seed` or `expert@expert-0`: an edge points from a
stage to one whose output it reads. The attribute `place` of a stage is its place in dvc.yaml.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import yaml

from mode import roles
from mode.errors import ModeError, in_one_line
from mode.paths import Paths


def make_pipeline(needs: Mapping[str, Collection[str]]) -> nx.DiGraph:
    """A pipeline from the stages that each stage needs, in the order of dvc.yaml."""
    pipeline = nx.DiGraph(needs)
    nx.set_node_attributes(pipeline, {stage: place for place, stage in enumerate(needs)}, "place")
    return pipeline


def in_order(pipeline: nx.DiGraph) -> list[str]:
    """The stages in an order in which they can run; among those that are ready together the first in dvc.yaml leads."""
    return list(nx.lexicographical_topological_sort(pipeline.reverse(copy=False), pipeline.nodes("place").__getitem__))


def upto(pipeline: nx.DiGraph, targets: Iterable[str]) -> nx.DiGraph:
    """The part of a pipeline that makes `targets`. Raises `ModeError`, which names all, if there is no such stage."""
    kept: set[str] = set()
    for target in targets:
        if target not in pipeline:
            raise ModeError(f"no stage is called '{target}'", f"dvc.yaml has: {', '.join(in_order(pipeline))}")
        kept |= {target} | nx.descendants(pipeline, target)
    return pipeline.subgraph(kept)


def first(pipeline: nx.DiGraph, stages: Sequence[str]) -> nx.DiGraph:
    """The same pipeline with these stages, and what they need, before all others that could run as well."""
    wanted = {stage: turn for turn, stage in enumerate(stages, start=1) if stage in pipeline}
    needed = set().union(*(nx.descendants(pipeline, stage) for stage in wanted))
    turns = dict.fromkeys(pipeline, len(stages) + 1) | dict.fromkeys(needed, 0) | wanted
    reordered = pipeline.copy()
    places = {stage: (turns[stage], place) for stage, place in pipeline.nodes("place")}
    nx.set_node_attributes(reordered, places, "place")
    return reordered


def group(stage: str) -> str:
    """`expert` of `expert@expert-0`."""
    return stage.partition("@")[0]


def stage_of(pipeline: nx.DiGraph, expert: str) -> str:
    """The stage that trains an expert, or trains it on where that is the name of an update."""
    update = f"{roles.UPDATE.name}@{expert}"
    return update if update in pipeline else f"{roles.EXPERT.name}@{expert}"


def experts_of(pipeline: nx.DiGraph) -> list[str]:
    """Names of the experts, and of the updates of experts, that a pipeline trains."""
    groups = (roles.EXPERT.name, roles.UPDATE.name)
    return [stage.partition("@")[2] for stage in in_order(pipeline) if group(stage) in groups]


def read(root: Path) -> tuple[nx.DiGraph, set[str]]:
    """The pipeline of a project, and those of its stages that are not up to date (`dvc status`).

    A stage that is not among those, but needs one that is, may still change.

    Raises:
        ModeError: dvc.yaml or params.yaml cannot be read as a pipeline.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            graph: Any = repo.index.graph
            # DVC lists stages as dvc.yaml does, and those of one group as params.yaml does.
            needs = {stage.addressing: [need.addressing for need in graph[stage]] for stage in repo.index.stages}
            pipeline = make_pipeline(needs)
            try:
                _mend_rwlock(repo)
                stale = set(repo.status())
            except LockError:  # someone runs DVC by hand: let `dvc repro` decide
                stale = set(pipeline)
    except DvcException as error:
        raise ModeError(f"DVC: {in_one_line(error)}", "`dvc status` in the project says more") from None
    return pipeline, stale


def _mend_rwlock(repo: Any) -> None:
    """Drop DVC's list of who reads and writes what, if it is torn.

    DVC rewrites that file in place. If it is killed in this very moment the file stays empty, and DVC refuses to run
    from then on. Nobody is writing it while its lock is held here.
    """
    from dvc.lock import make_lock
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    folder = Path(repo.tmp_dir)
    hardlink = repo.config["core"].get("hardlink_lock", False)
    with make_lock(str(folder / RWLOCK_LOCK), tmp_dir=repo.tmp_dir, hardlink_lock=hardlink):
        try:
            json.loads((folder / RWLOCK_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except ValueError:
            (folder / RWLOCK_FILE).unlink()


def results(root: Path, patience: float = 60.0) -> dict[str, Any]:
    """What dvc.lock records as each stage's outputs.

    DVC writes that file in place and piece by piece, while other stages begin and end. What ends in the middle of a
    line is read again; stages that are not written yet are missing.

    Raises:
        ModeError: it cannot be read for `patience` seconds.
    """
    path = Paths(root).dvc_lock
    deadline = time.monotonic() + patience
    while True:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
            return {name: stage.get("outs") for name, stage in ((content or {}).get("stages") or {}).items()}
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError):  # the last: half of a line is no mapping
            if time.monotonic() >= deadline:
                raise ModeError(f"{path}: damaged: no list of stages", "`git checkout` it, or remove it") from None
        time.sleep(0.1)
