"""What DVC knows about the pipeline: its stages, what each needs, and which are not up to date."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mode.errors import ModeError


@dataclass(frozen=True)
class Graph:
    """Stages by their address in DVC, such as `seed` or `expert@expert-0`.

    Attributes:
        needs: for each stage the stages whose outputs it reads; in an order in which they can run.
    """

    needs: dict[str, frozenset[str]]

    @classmethod
    def of(cls, edges: dict[str, Iterable[str]]) -> Graph:
        """From the direct needs of each stage, in any order; stages that are ready together stay in the given order."""
        needs = {stage: frozenset(found) for stage, found in edges.items()}
        ordered: dict[str, frozenset[str]] = {}
        while len(ordered) < len(needs):
            ready = [stage for stage in needs if stage not in ordered and needs[stage] <= ordered.keys()]
            if not ready:
                raise ModeError(f"dvc.yaml: stages need each other: {', '.join(sorted(set(needs) - set(ordered)))}")
            ordered |= {stage: needs[stage] for stage in ready}
        return cls(ordered)

    def before(self, stage: str) -> set[str]:
        """All stages that a stage needs, directly or not."""
        found: set[str] = set()
        waiting = [*self.needs[stage]]
        while waiting:
            other = waiting.pop()
            if other not in found:
                found.add(other)
                waiting += self.needs[other]
        return found

    def upto(self, targets: Iterable[str]) -> Graph:
        """The part of the pipeline that makes `targets`.

        Raises:
            ModeError: dvc.yaml has no such stage; names those there are.
        """
        kept: set[str] = set()
        for target in targets:
            if target not in self.needs:
                raise ModeError(f"no stage is called '{target}'", f"dvc.yaml has: {', '.join(self.needs)}")
            kept |= {target} | self.before(target)
        return Graph({stage: needs for stage, needs in self.needs.items() if stage in kept})

    def only(self, targets: Iterable[str]) -> Graph:
        """Just these stages, whatever they need."""
        part = self.upto(targets)
        kept = set(targets)
        return Graph({stage: part.needs[stage] & kept for stage in part.needs if stage in kept})

    def first(self, stages: Sequence[str]) -> Graph:
        """The same pipeline with these stages, and what they need, before all others that could run as well."""
        wanted = [stage for stage in stages if stage in self.needs]
        early = set(wanted).union(*(self.before(stage) for stage in wanted))
        leading = [stage for stage in self.needs if stage in early - set(wanted)]
        rest = [stage for stage in self.needs if stage not in early]
        return Graph({stage: self.needs[stage] for stage in [*leading, *wanted, *rest]})


def read(root: Path) -> tuple[Graph, set[str]]:
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
            edges = {stage.addressing: [need.addressing for need in graph.successors(stage)] for stage in graph}
            pipeline = Graph.of({stage: edges[stage] for stage in _in_file_order(root, edges)})
            try:
                _mend_rwlock(repo)
                stale = set(repo.status())
            except LockError:  # someone runs DVC by hand: let `dvc repro` decide
                stale = set(pipeline.needs)
    except DvcException as error:
        raise ModeError(f"DVC: {' '.join(str(error).split())}", "`dvc status` in the project says more") from None
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


def results(root: Path) -> dict[str, Any]:
    """What dvc.lock records as each stage's outputs."""
    path = root / "dvc.lock"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return {name: stage.get("outs") for name, stage in ((content or {}).get("stages") or {}).items()}


def _in_file_order(root: Path, stages: Iterable[str]) -> list[str]:
    """Stages in the order of dvc.yaml, items of one group by name with numbers in order (expert-2 before expert-10)."""
    path = root / "dvc.yaml"
    groups = list(yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]) if path.is_file() else []

    def place(stage: str) -> tuple[int, list[tuple[int, str]]]:
        group, _, key = stage.partition("@")
        head, _, number = key.rpartition("-")
        parts = [(0, head), (int(number), "")] if number.isdigit() else [(0, key)]
        return (groups.index(group) if group in groups else len(groups)), parts

    return sorted(stages, key=place)
