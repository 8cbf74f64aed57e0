"""One flow at a time in a project folder, and knowing which runs are still alive."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from prefect import get_run_logger
from prefect.runtime import flow_run

from flows.locks import Lock, holder, is_held
from mode.errors import ModeError
from mode.processes import die_with_parent

FLOW_LOCK = Path(".mode") / "flow.lock"
RUNS = Path(".mode") / "runs"
_alive: list[Lock | None] = []


@contextlib.contextmanager
def workspace(root: Path, wait: bool, poll_seconds: float = 1.0) -> Iterator[Lock]:
    """Hold the project folder for this flow run.

    The lock is to be handed to every stage: if the flow is killed, the next one must not start before the stages have
    written their checkpoints and gone.

    Args:
        root: of the project.
        wait: wait for a flow that holds it, or fail at once; either says who that is.
        poll_seconds: between two looks.

    Raises:
        ModeError: another flow holds it and `wait` is false.
    """
    path = root / FLOW_LOCK
    me = f"{flow_run.get_flow_name()} run '{flow_run.get_name()}' ({socket.gethostname()}, process {os.getpid()})"
    told = ""
    while (lock := Lock.take(path, me)) is None:
        other = holder(path)
        if not wait:
            raise ModeError(f"this project is held by {other}", "wait for it or cancel it, or start with `wait` on")
        if other != told:
            get_run_logger().info("waiting: this project is held by %s", other)
            told = other
        time.sleep(poll_seconds)
    with lock:
        yield lock


def mark_alive(root: Path) -> None:
    """Hold this run's own lock to the end of its process, and end with the worker; nothing without a worker.

    Not to the end of the flow: its final state is sent after that.
    """
    run = os.environ.get("PREFECT__FLOW_RUN_ID")
    if run:
        die_with_parent()
        _alive.append(Lock.take(root / RUNS / run, str(os.getpid())))


def dead_runs(root: Path) -> list[str]:
    """Ids of runs that were started on this machine and whose process has gone."""
    folder = root / RUNS
    return [path.name for path in sorted(folder.iterdir()) if not is_held(path)] if folder.is_dir() else []


def forget_run(root: Path, run: str) -> None:
    """Drop a run's mark, once its final state is known."""
    (root / RUNS / run).unlink(missing_ok=True)
