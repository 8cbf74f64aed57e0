"""What Slurm is asked, as lists of arguments that no shell reads, and what it answers."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mode.errors import ModeError
from mode.params import MachineParams

#: Seconds that a command of Slurm may take.
PATIENCE = 60
#: States of a job that has ended for good, as scontrol(1) writes them; in any other it may still run.
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
    | {"REVOKED", "TIMEOUT"}
)
#: Why a job waits that will never start, as squeue(1) lists reasons.
_HOPELESS = re.compile(
    r"Partition(Time|Node)Limit|BadConstraints|Invalid(Account|QOS)|(Account|QOS)NotAllowed|\w+PerJob(Limit)?|DependencyNeverSatisfied"
)
#: Variables in which a user says how he likes these commands to answer: SQUEUE_STATES=running hides jobs that wait, and
#: with SCANCEL_INTERACTIVE=true nothing is cancelled, but a question asked for ever.
_LIKINGS = ("SQUEUE_", "SCANCEL_", "SCONTROL_")
_NO_SUCH_JOB = "Invalid job id specified"
#: What sbatch says where the controller is away or too busy, and not that the job is wrong.
_AWAY = re.compile(
    r"[Uu]nable to contact|timed out|[Cc]onnection refused|[Cc]onnect failure|temporarily|Zero Bytes|communication"
)


class Unreachable(Exception):
    """Slurm's controller does not answer now; jobs go on without it."""


@dataclass(frozen=True)
class Job:
    """A job, as Slurm sees it.

    Attributes:
        state: such as `PENDING`.
        reason: why it waits or has failed, such as `Priority`.
        nodes: where it runs, as Slurm writes lists of nodes; empty: nowhere.
        code: exit code of the job script; 128 and the signal's number where one ended it.
        restarts: how often Slurm has requeued it.
        name: as it was submitted.
    """

    state: str
    reason: str = ""
    nodes: str = ""
    code: int = 0
    restarts: int = 0
    name: str = ""

    @property
    def ended(self) -> bool:
        """Whether it has ended for good."""
        return self.state in ENDED

    @property
    def hopeless(self) -> bool:
        """Whether it waits for what will not come."""
        return self.state == "PENDING" and _HOPELESS.fullmatch(self.reason) is not None


def submit_options(machine: MachineParams, name: str, log: str) -> list[str]:
    """Options of sbatch(1) for the job of a training.

    Args:
        machine: how many nodes, processes and cores; a GPU for each process unless its device is `cpu`.
        name: of the job.
        log: where its output is added to, from the job's folder on.
    """
    slurm = machine.slurm
    options = {
        "job-name": name,
        "output": log,
        "open-mode": "append",
        "nodes": machine.nodes,
        "ntasks": machine.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": slurm.cpus or machine.processes * (1 + machine.workers),
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "time": slurm.minutes,
        "signal": f"TERM@{slurm.notice_seconds}" if slurm.notice_seconds else None,
        "mem": f"{slurm.memory_gb}G" if slurm.memory_gb else None,
        "constraint": slurm.constraint,
        "gres": ",".join(f"{resource}:{count}" for resource, count in slurm.resources.items()),
    }
    if machine.device != "cpu":
        options["gpus-per-node"] = f"{slurm.gpu}:{machine.processes}" if slurm.gpu else machine.processes
    return ["--requeue", *(f"--{option}={value}" for option, value in options.items() if value not in ("", None))]


def submit(options: Sequence[str], command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> int:
    """Submit a job script with its arguments, to run in `folder`; returns the job's id.

    Raises:
        ModeError: Slurm refuses it.
        Unreachable: nobody answered; it may have been submitted all the same.
    """
    done = _run(["sbatch", "--parsable", f"--chdir={folder}", *options, *command], environment)
    if done.returncode == 0 and (found := re.match(r"(\d+)(;|\n|$)", done.stdout)):
        return int(found[1])
    reason = _last_line(done)
    if done.returncode == 0 or _AWAY.search(reason):
        raise Unreachable(reason)
    raise ModeError(f"Slurm refuses the job: {reason}", "change machine.slurm in params.yaml, or the form's `slurm`")


def look_at(job: int, name: str) -> Job | None:
    """How a job stands; None: Slurm does not know it, or no longer. Raises `Unreachable`.

    A controller that has lost its state counts from the beginning again: a job of that number but another name is
    somebody else's.
    """
    done = _run(["scontrol", "--oneliner", "show", "job", str(job)])
    if done.returncode == 0:
        found = parse_job(done.stdout)
        return found if found.name == name else None
    if _NO_SUCH_JOB in done.stderr + done.stdout:
        return None
    raise Unreachable(_last_line(done))


def parse_job(text: str) -> Job:
    """A line of `scontrol --oneliner show job`.

    Example:
        >>> parse_job("JobId=7 JobName=a JobState=FAILED Reason=NonZeroExitCode Restarts=1 ExitCode=1:0 NodeList=n1")
        Job(state='FAILED', reason='NonZeroExitCode', nodes='n1', code=1, restarts=1, name='a')
    """
    values = {
        key: "" if value in ("(null)", "None") else value for key, value in re.findall(r"(?<!\S)(\w+)=(\S*)", text)
    }
    code, _, number = values.get("ExitCode", "0:0").partition(":")
    return Job(
        state=values.get("JobState", "UNKNOWN").partition("+")[0],
        reason=values.get("Reason", ""),
        nodes=values.get("NodeList", ""),
        code=128 + int(number) if number.isdecimal() and int(number) else int(code) if code.isdecimal() else 0,
        restarts=int(restarts) if (restarts := values.get("Restarts", "0")).isdecimal() else 0,
        name=values.get("JobName", ""),
    )


def jobs_called(name: str, ended: bool = False) -> list[int]:
    """Ids of the jobs of this name, ascending: those that have not ended, or also those that have `ended` of late.

    Slurm lists a job for some minutes after its end (`MinJobAge`). Raises `Unreachable`.
    """
    states = ["--states=all"] if ended else []
    done = _run(["squeue", "--noheader", "--me", f"--name={name}", "--format=%A", *states])
    if done.returncode:
        raise Unreachable(_last_line(done))
    return sorted(int(line) for line in done.stdout.split() if line.isdecimal())


def cancel(job: int, name: str) -> None:
    """Have Slurm end the job of this number and name: SIGTERM, SIGKILL after its `KillWait`. Raises `Unreachable`."""
    done = _run(["scancel", f"--name={name}", str(job)])
    if done.returncode and _NO_SUCH_JOB not in done.stderr:
        raise Unreachable(_last_line(done))


def environment_of_questions(environment: Mapping[str, str]) -> dict[str, str]:
    """What of this process's environment a command is given that looks at jobs or cancels them.

    It asks the cluster that sbatch submits to.
    """
    kept = {name: value for name, value in environment.items() if not name.startswith(_LIKINGS)}
    if cluster := environment.get("SLURM_CLUSTERS") or environment.get("SBATCH_CLUSTERS"):
        kept["SLURM_CLUSTERS"] = cluster
    return kept


def _run(command: list[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=environment_of_questions(os.environ) if environment is None else dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=PATIENCE,
            start_new_session=True,  # Ctrl-C is for the process that waits, which has to be able to cancel then
        )
    except FileNotFoundError:
        raise ModeError(
            f"no `{command[0]}` here, but machine.launch is slurm",
            "start it where Slurm's commands are, or launch: local",
        ) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]} took more than {PATIENCE} s") from None


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return re.sub(r"^\w+: (error: )?", "", lines[-1]) if lines else f"exit code {done.returncode}"
