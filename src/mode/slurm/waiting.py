"""The process that waits for a training's job: submits it, passes its output on, cancels it when it is told to stop.

Whoever started this process (DVC, a flow, a terminal) sees what a training on this machine would show: the same output,
the same exit codes, and SIGTERM or Ctrl-C stops it with a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import as_file, files
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mode.errors import ModeError
from mode.files import only_writer, write_aside
from mode.params import MachineParams
from mode.paths import JobPaths, Paths
from mode.processes import noting_signals
from mode.slurm import commands
from mode.slurm.commands import Job, Unreachable

#: Seconds between two looks at the job's output, and at signals.
TICK = 0.2
#: Jobs in a row that may be stopped before they leave a new checkpoint.
FRUITLESS = 3
#: How jobs end that were stopped and not at fault.
STOPPED = frozenset({"PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "TIMEOUT"})
#: Exit codes of a training that was told to stop: SIGINT, SIGTERM, or killed after that.
TOLD = frozenset({130, 143, 137})
#: Of Slurm's variables, the one that says which Slurm.
_WHICH = "SLURM_CONF"
_NAME = re.compile(r"[a-z0-9._-]{1,255}")


class JobCancelled(ModeError):
    """Somebody else has cancelled the job: it is not tried again."""

    exit_code = 128 + signal.SIGTERM


def run_as_job(training: str, command: Sequence[str], machine: MachineParams, root: Path) -> None:
    """Run a training's command as a job in the project's folder, and end as that does.

    A job that was stopped (preempted, at its time limit, with its node) goes on: Slurm requeues it, or another one is
    submitted. What an earlier process of this kind has left in the queue is cancelled first.

    Args:
        training: the name of its model, such as `expert-0`.
        command: of the training, which finds the same project and environment wherever the job runs.
        machine: what Slurm is asked for.
        root: of the project.

    Raises:
        ModeError: Slurm refuses the job; it cannot start, or ended in a way that another job would as well.
        JobCancelled: somebody else cancelled it.
        SystemExit: with the code of the training where that is not 0; 143 or 130 after a signal, with the job gone.
    """
    paths = Paths(root).job(training)
    paths.folder.mkdir(parents=True, exist_ok=True)
    for folder in (paths.folder.parent, paths.folder):
        folder.chmod(0o700)
    with only_writer(paths.lock, f"the job of {training}"), noting_signals() as told:
        code = _Wait(training, command, machine, Paths(root), paths, told).run()
    if code:
        sys.stdout.flush()
        sys.exit(code)


def environment_of_jobs(environment: dict[str, str]) -> dict[str, str]:
    """What of this process's environment a job is given: not that of a job that this process may be in itself.

    The job computes, and submits nothing. Which cluster it goes to is said to sbatch, and to no command in the job.
    """
    dropped = tuple(f"{prefix}_" for prefix in ("SLURM", "PREFECT"))
    kept = {name: value for name, value in environment.items() if name == _WHICH or not name.startswith(dropped)}
    if cluster := environment.get("SLURM_CLUSTERS"):
        kept["SBATCH_CLUSTERS"] = cluster
    return kept | {"MODE_LAUNCH": "local"}


def exit_code(job: Job, training: str, number: int) -> int | None:
    """What the end of a job means: the training's exit code, or None: it was stopped, and is to go on.

    Raises `ModeError` where it would end so again, `JobCancelled` where somebody else has cancelled it.
    """
    what = f"{training}: job {number}"
    if job.state == "COMPLETED":
        return 0
    if job.state in STOPPED or (job.state == "FAILED" and job.code in TOLD):
        return None
    if job.state == "FAILED":
        return job.code or 1
    if job.state == "CANCELLED":
        raise JobCancelled(f"{what} was cancelled by somebody else", "the next run goes on from its last checkpoint")
    if job.state == "OUT_OF_MEMORY":
        raise ModeError(f"{what} needed more memory than it had", "machine.slurm.memory_gb, or fewer machine.workers")
    raise ModeError(
        f"{what} ended as {job.state}{f' ({job.reason})' if job.reason else ''}", "ask Slurm's administrator"
    )


class _Wait:
    """Jobs of one training, one after the other."""

    def __init__(
        self,
        training: str,
        command: Sequence[str],
        machine: MachineParams,
        project: Paths,
        paths: JobPaths,
        told: list[int],
    ) -> None:
        self.training, self.command, self.machine = training, command, machine
        self.project, self.paths, self.told = project, paths, told
        self._read = 0
        self._said = ""
        self._name = ""  # of the present submission's job
        self._twice = False  # whether the present submission was made twice

    def run(self) -> int:
        """The exit code, after as many jobs as it takes."""
        self._cancel_earlier()
        self.paths.log.unlink(missing_ok=True)
        self._read = 0
        fruitless, before = 0, self._checkpoint()
        while not self.told:
            self.paths.exit.unlink(missing_ok=True)
            number = self._submit()
            if number is None:
                break
            job = self._until_ended(number)
            if self.told and job.state != "COMPLETED":
                break
            code = exit_code(job, self.training, number)
            if code is not None:
                with suppress(Unreachable):  # it would do nothing
                    self._cancel_twin()
                self.paths.name.unlink(missing_ok=True)
                return code
            after = self._checkpoint()
            fruitless, before = fruitless + 1 if after == before else 0, after
            end = job.state if job.state in STOPPED else f"exit code {job.code}"
            if fruitless == FRUITLESS:
                raise ModeError(
                    f"{self.training}: {FRUITLESS} jobs in a row were stopped without a new checkpoint ({end})",
                    f"a longer machine.slurm.minutes, a shorter machine.checkpoint_minutes; output: {self.paths.log}",
                )
            self._say(f"job {number} was stopped ({end}); another one goes on from the last checkpoint")
        return 128 + self.told[0]

    def _cancel_earlier(self) -> None:
        """End what a process that was killed has left in the queue: a model has one job."""
        name = self.paths.name.read_text(encoding="utf-8").strip() if self.paths.name.is_file() else ""
        if not _NAME.fullmatch(name):
            return
        cancelled: set[int] = set()
        while not self.told:
            try:
                if not (left := commands.jobs_called(name)):
                    return
                self._say(f"job {left[0]} is left of an earlier run: it is cancelled, and the new one goes on")
                for number in set(left) - cancelled:
                    commands.cancel(number, name)
                    cancelled.add(number)
            except Unreachable as reason:
                self._say_unreachable(reason)
            self._pause()

    def _submit(self) -> int | None:
        """The id of a new job; None: told to stop before there was one. Waits where Slurm does not answer."""
        self._name = f"mode-{self.training}-{secrets.token_hex(4)}"
        # The name is known before the job is, so that no job can be lost.
        with write_aside(self.paths.name) as temporary:
            temporary.write_text(self._name, encoding="utf-8")
        self.paths.claim.unlink(missing_ok=True)
        log, folder = (str(path.relative_to(self.project.root)) for path in (self.paths.log, self.paths.folder))
        options = commands.submit_options(self.machine, self._name, log)
        in_doubt = self._twice = False
        while in_doubt or not self.told:
            try:
                if in_doubt and (
                    there := self._claimed() or next(iter(commands.jobs_called(self._name, ended=True)), None)
                ):
                    self._say(f"job {there} was submitted")
                    return there
                if in_doubt:  # none has come of it, or none yet: one of the two does nothing then (job.sh)
                    in_doubt, self._twice = False, True
                    continue
                with as_file(files("mode.slurm") / "job.sh") as script:
                    job = [str(script), folder, *self.command]
                    return commands.submit(options, job, self.project.root, environment_of_jobs(dict(os.environ)))
            except Unreachable as reason:
                in_doubt = True
                self._say_unreachable(reason)
            self._pause()
        return None

    def _until_ended(self, number: int) -> Job:
        """How a job ended, with its output passed on; once told to stop, it is cancelled and soon gone."""
        cancelled = False
        while True:
            try:
                if self.told and not cancelled:
                    self._cancel_twin()
                    commands.cancel(number, self._name)
                    cancelled = True
                    self._say(f"job {number} is cancelled: it writes its checkpoint")
                number = self._claimed() or number
                job = commands.look_at(number, self._name) or self._forgotten(number)
                if job.ended and self._claimed() in (None, number):
                    self._pass_on()
                    return job
                self._say_state(number, job)
                if job.hopeless:
                    commands.cancel(number, self._name)
                    raise ModeError(
                        f"{self.training}: job {number} can never start: {job.reason}", "ask for less in machine.slurm"
                    )
            except Unreachable as reason:
                self._say_unreachable(reason)
            self._pause()

    def _cancel_twin(self) -> None:
        """End what a submission that was made twice has in the queue, but for the job that does the work."""
        if self._twice:
            for number in set(commands.jobs_called(self._name)) - {self._claimed()}:
                commands.cancel(number, self._name)

    def _claimed(self) -> int | None:
        """The job that does the work, where that is known: of one submission there may be several."""
        text = self.paths.claim.read_text(encoding="utf-8").strip() if self.paths.claim.is_file() else ""
        return int(text) if text.isdecimal() else None

    def _forgotten(self, number: int) -> Job:
        """A job that Slurm no longer lists, by the exit code that it has left."""
        text = self.paths.exit.read_text(encoding="utf-8").strip() if self.paths.exit.is_file() else ""
        if self.told:
            return Job("CANCELLED")
        if not re.fullmatch(r"[0-9]{1,3}", text):
            raise ModeError(
                f"{self.training}: Slurm no longer knows job {number}, which has left no exit code",
                f"the next run goes on from its last checkpoint; output: {self.paths.log}",
            )
        return Job("FAILED" if int(text) else "COMPLETED", code=int(text))

    def _checkpoint(self) -> list[tuple[str, str]]:
        """What tells that a training has got on: its checkpoints by their content, as a node's clock may be wrong."""
        found = sorted((self.project.checkpoints / self.training).glob("*/*.safetensors"))
        return [(str(path), _record_of(path)) for path in found]

    def _pause(self) -> None:
        """Until the next look at the job, or a signal; passes output on meanwhile."""
        already, until = len(self.told), time.monotonic() + (TICK if self.told else self.machine.slurm.poll_seconds)
        while True:
            self._pass_on()
            left = until - time.monotonic()
            if left <= 0 or len(self.told) > already:
                return
            time.sleep(min(TICK, left))

    def _pass_on(self) -> None:
        """What the job has written since the last time."""
        if not self.paths.log.is_file():
            return
        with self.paths.log.open("rb") as log:
            log.seek(self._read)
            while block := log.read(2**16):
                self._read += len(block)
                sys.stdout.buffer.write(block)
        sys.stdout.flush()

    def _say_state(self, number: int, job: Job) -> None:
        place = f" on {job.nodes}" if job.nodes else ""
        why = f" ({job.reason})" if job.reason and job.state == "PENDING" else ""
        again = f", restart {job.restarts}" if job.restarts else ""
        self._say(f"job {number} is {job.state.lower()}{place}{why}{again}")

    def _say_unreachable(self, reason: Unreachable) -> None:
        self._say(f"Slurm does not answer, and is asked again: {reason}")

    def _say(self, what: str) -> None:
        """One line, once."""
        if what != self._said:
            self._said = what
            print(f"{self.training}: {what}", file=sys.stderr, flush=True)


def _record_of(path: Path) -> str:
    """What a checkpoint says of itself, with the checksum of its content; nothing of one that cannot be read."""
    try:
        with safe_open(path, "numpy") as file:
            return json.dumps(file.metadata(), sort_keys=True)
    except (OSError, SafetensorError):
        return ""
