"""Run one command so that it never leaves a process behind: `python -m flows.supervise COMMAND ...`.

Stands between a flow and `dvc repro`. DVC dies of the SIGTERM that a cancel sends to the whole process group, while
its stage still writes a checkpoint; and it closes inherited files, so the stage cannot hold a lock. This process can do
both: it adopts orphans of its command (Linux: child subreaper), passes SIGTERM and SIGINT on, allows MODE_STOP_SECONDS
(12) for the checkpoint, kills what is left, and ends last, so the locks it inherited are freed when the last process
has gone. If the flow dies, it is told by the kernel and does the same.

Exit code: that of the command; 143 if it was told to stop.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from mode.errors import ModeError, exit_code_of
from mode.processes import adopt_orphans, die_with_parent

_VARIABLE = "MODE_STOP_SECONDS"
#: The process that starts a supervisor, whose end is that of its command too. A parent that is process 1 says nothing:
#: it adopts orphans, and in a container it may be the flow.
_STARTED_BY = "MODE_STARTED_BY"
STOPPED = 128 + signal.SIGTERM


def supervised(
    command: Sequence[str],
    environment: Mapping[str, str],
    seconds: float,
    held: Iterable[int],
    folder: Path | None = None,
    alone: bool = False,
) -> subprocess.Popen[str]:
    """Start a command under a supervisor; its output is one stream of lines, for the caller to read.

    Each state of a progress bar, which writes over itself by carriage returns, is a line.

    Args:
        command: the program and its arguments.
        environment: all of it.
        seconds: between SIGTERM and SIGKILL, of `machine.stop_seconds`: a training under it is told the same.
        held: file descriptors of locks, which are kept until its last process has gone.
        folder: where it runs; default: here.
        alone: in a session of its own, so that Ctrl-C reaches the caller only.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "flows.supervise", *command],
        cwd=folder,
        env={**environment, _VARIABLE: str(seconds), _STARTED_BY: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=tuple(held),
        start_new_session=alone,
    )


def errors_in(lines: Iterable[str]) -> list[str]:
    """Those of a command's lines that speak of an error; if none does, all of them."""
    every = [*lines]
    return [line for line in every if "rror" in line] or every


def main(command: list[str]) -> int:
    """Run the command and wait until it and all its descendants are gone.

    Raises `ModeError` if MODE_STOP_SECONDS is no time.
    """
    told, grace = 0.0, _grace(os.environ.get(_VARIABLE) or "12")

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal told
        told = told or time.monotonic()

    parent = int(os.environ.pop(_STARTED_BY, os.getppid()))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    adopt_orphans()
    die_with_parent()
    if os.getppid() != parent:  # it has ended already
        stop(signal.SIGTERM, None)
    if told:
        return STOPPED
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
    assert child.stdout is not None
    relay = threading.Thread(target=_relay, args=(child.stdout.fileno(), sys.stdout.fileno()))
    relay.start()
    code: int | None = None
    warned: set[psutil.Process] = set()
    while True:
        ended, status = _next_ended()
        if ended == child.pid:
            code = os.waitstatus_to_exitcode(status)
        if ended < 0:  # no process is left
            break
        if ended:
            continue
        if told or code is not None:  # an orphan of a command that has ended is told to end as well
            told = told or time.monotonic()
            _tell(psutil.Process().children(recursive=True), warned, kill=time.monotonic() - told > grace)
        time.sleep(0.05)
    relay.join()
    if code is None or (told and code < 0):
        return STOPPED
    return 128 - code if code < 0 else code  # as a shell says it


def _grace(given: str) -> float:
    """Seconds between SIGTERM and SIGKILL."""
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(given)) < math.inf:
            return seconds
    raise ModeError(f"{_VARIABLE}: '{given}' is no time", "set it to seconds above 0, such as 100")


def _relay(source: int, target: int) -> None:
    """Pass bytes on to the end, and drop them once the other side has closed."""
    while chunk := os.read(source, 2**16):
        with contextlib.suppress(BrokenPipeError):
            while chunk:
                chunk = chunk[os.write(target, chunk) :]


def _next_ended() -> tuple[int, int]:
    """(pid, status) of a child that ended; pid 0: all live; -1: there is none."""
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return -1, 0


def _tell(processes: Iterable[psutil.Process], warned: set[psutil.Process], kill: bool) -> None:
    """SIGTERM to each process once, or SIGKILL."""
    for process in processes:
        if kill or process not in warned:
            warned.add(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))
