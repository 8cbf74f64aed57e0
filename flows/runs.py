"""Which runs of this machine are alive: each holds a lock, which ends with its process."""

from __future__ import annotations

import os
from pathlib import Path

from flows.locks import Lock, is_held
from mode.paths import Paths
from mode.processes import die_with_parent

_alive: list[Lock | None] = []


def mark_alive(root: Path) -> None:
    """Hold this run's own lock to the end of its process, and end with the worker; nothing without a worker.

    Not to the end of the flow: its final state is sent after that.
    """
    run = os.environ.get("PREFECT__FLOW_RUN_ID")
    if run:
        die_with_parent()
        _alive.append(Lock.take(Paths(root).live_runs / run, str(os.getpid())))


def all_dead(root: Path) -> bool:
    """Whether no run that was started on this machine has a process."""
    return not any(is_held(path) for path in _marks(root))


def dead_runs(root: Path) -> list[str]:
    """Ids of runs that were started on this machine and whose process has gone."""
    return [path.name for path in _marks(root) if not is_held(path)]


def forget_run(root: Path, run: str) -> None:
    """Drop a run's mark, once its final state is known."""
    (Paths(root).live_runs / run).unlink(missing_ok=True)


def _marks(root: Path) -> list[Path]:
    folder = Paths(root).live_runs
    return sorted(folder.iterdir()) if folder.is_dir() else []
