"""One flow at a time in a project folder."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from prefect import get_run_logger
from prefect.runtime import flow_run

from flows.locks import Lock, holder
from mode.errors import ModeError
from mode.paths import Paths


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
    path = Paths(root).flow_lock
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
