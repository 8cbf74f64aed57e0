"""One Prefect task = one DVC stage, run as `dvc --wait-for-lock repro --single-item STAGE`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from flows import tools_first
from flows.devices import stage_settings
from flows.supervise import errors_in, supervised
from mode.params import load_params
from mode.paths import Paths

#: DVC's words for "nothing had to run".
SKIPPED = re.compile(r"^Stage '.*' (didn't change, skipping|is cached - skipping run)")
#: DVC's words for an output that its cache had no room for, where the command itself has done its work.
UNKEPT = re.compile(r"^ERROR: failed to (?:transfer '[^']*' - |reproduce '[^']*': (?=\[Errno (?:28|122)\]))(.*)")
#: Name of the state of such a stage.
NOT_KEPT = "Not kept"
STAGE_EXIT = re.compile(r"exited with (-?\d+)\s*$")
#: Exit codes of a stage that was told to stop (SIGINT, SIGTERM), or killed: not a fault, so never retried.
STOPPED_CODES = frozenset({130, 143, 137, -2, -15, -9})

#: Running commands, with the seconds that each has to end in.
_running: dict[subprocess.Popen[str], float] = {}
_guard = threading.Lock()
_stopping = threading.Event()


class StageFailed(Exception):
    """A command ended with an error; the message holds its last lines, `lines` more of them."""

    def __init__(self, message: str, lines: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.lines = [*lines]


class StageStopped(Exception):
    """A command was cancelled or killed."""


def _may_try_again(_task: object, _run: object, state: State[Any]) -> bool:
    """Not a stage whose flow is being stopped, nor one that is done: it would begin from nothing."""
    return not _stopping.is_set() and state.name != NOT_KEPT


@task(
    name="DVC stage",
    task_run_name="{stage}",
    retry_condition_fn=_may_try_again,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def run_stage(
    stage: str,
    place: dict[str, str],
    threads: int,
    held: tuple[int, ...] = (),
    up_to_date: bool = False,
    engine: str = "",
) -> State[Any]:
    """Run a stage of dvc.yaml, with its output as this task's log.

    A retry goes on from the stage's last checkpoint. A stage that was cancelled ends as Cancelled and is not retried,
    nor is one whose output DVC's cache has no room for: it lies in the project, and `dvc commit` keeps it.

    Args:
        stage: its address in DVC, such as `seed` or `expert@expert-0`.
        place: the settings of its place (`flows.devices.Place`); empty: it computes where params.yaml says.
        threads: CPU threads for a training where params.yaml leaves them open; 0: as many as it takes.
        held: locks to hand to it (file descriptors), so that they are kept until its last process has gone.
        up_to_date: DVC has said already that nothing is to do.
        engine: where it spreads blocks of captions, if it does; empty: as params.yaml says.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage]
    try:
        lines = [] if up_to_date else run_command(command, stage_settings(place, threads, engine), held)
    except StageStopped as stopped:
        return Cancelled(message=str(stopped))
    except StageFailed as failed:
        if not (reason := unkept(failed.lines)):
            raise
    else:
        reason = unkept(lines)
    if reason:
        advice = f"make room there, then `dvc commit --force {stage}`: to run it again would begin it anew"
        message = f"{stage} is done, but DVC's cache has not taken it: {reason} ({advice})"
        return Failed(name=NOT_KEPT, message=message)
    if up_to_date or any(SKIPPED.match(line) for line in lines):
        return Completed(name="Cached", message=f"{stage} is up to date")
    return Completed(message=f"{stage} is done")


def unkept(lines: Iterable[str]) -> str:
    """Why DVC's cache has not taken what a stage made, from what DVC printed; empty: it has.

    DVC may end well then. Its next run makes the output anew, for what the cache lacks counts as missing.
    """
    return next((found[1] for line in lines if (found := UNKEPT.match(line))), "")


@task(name="command", task_run_name="{title}", cache_policy=NO_CACHE, persist_result=False)
def run_step(title: str, command: list[str], held: tuple[int, ...] = ()) -> State[Any]:
    """Run any other command of the project, such as `mode add-source`, with its output as this task's log."""
    try:
        run_command([sys.executable, "-m", *command], {}, held)
    except StageStopped as stopped:
        return Cancelled(message=str(stopped))
    return Completed(message=f"{title} is done")


def run_command(command: list[str], settings: dict[str, str], held: Iterable[int] = ()) -> list[str]:
    """Run a command under supervision (see `flows.supervise`) and log its lines as they come.

    Returns:
        its last 200 lines.

    Raises:
        StageFailed: it ended with an error.
        StageStopped: it was told to stop, or killed.
    """
    log = get_run_logger()
    tail: deque[str] = deque(maxlen=200)
    with _started(command, settings, held) as process:
        assert process.stdout is not None
        for raw in process.stdout:
            if line := raw.rstrip():
                tail.append(line)
                log.info(line)
        code = process.wait()
    with _guard:
        del _running[process]
    if code == 0:
        return list(tail)
    exits = [int(found[1]) for line in tail if (found := STAGE_EXIT.search(line))]
    inner = exits[-1] if exits else code
    if inner in STOPPED_CODES or code in STOPPED_CODES or _stopping.is_set():
        raise StageStopped(f"stopped (exit code {inner}); the next run goes on from its last checkpoint")
    raise StageFailed(f"exit code {inner}: {' | '.join(errors_in(tail)[-3:])}", tail)


def stop_all() -> None:
    """Tell every running stage to stop, wait for its checkpoint, and return when the last process has gone."""
    _stopping.set()
    with _guard:
        processes = dict(_running)
    for process in processes:
        if process.poll() is None:
            process.terminate()
    told = time.monotonic()
    for process, seconds in processes.items():
        try:
            process.wait(max(0.1, told + seconds + 2 - time.monotonic()))
        except subprocess.TimeoutExpired:  # its command dies with it (PR_SET_PDEATHSIG)
            process.kill()


def _started(command: list[str], settings: dict[str, str], held: Iterable[int]) -> subprocess.Popen[str]:
    """Start a command in the flow's own process group, which a cancel reaches as a whole.

    The project's own commands come first in its path, and its output is not held back. Told to stop, it has
    `machine.stop_seconds` of the project in the current folder.
    """
    seconds = load_params(Paths(Path.cwd()).params_file).machine.stop_seconds
    # No stage knows Prefect, and none needs the secret of its server.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    environment = kept | {"PATH": tools_first(kept), "PYTHONUNBUFFERED": "1"} | settings
    with _guard:
        if _stopping.is_set():
            raise StageStopped("not started: the run is being stopped")
        process = supervised(command, environment, seconds, held)
        _running[process] = seconds
    return process
