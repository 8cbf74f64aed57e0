"""What the machine gives a stage: a job of a scheduler, processes that train together, an engine for many blocks."""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mode.errors import ModeError
from mode.parallel import cores
from mode.params import MachineParams
from mode.processes import handling_signals, leads
from mode.roles import TRAINED, UPDATE
from mode.stages.project import Project

if TYPE_CHECKING:
    from mode.engine import Engine

#: Stages that several processes can do together.
TRAININGS = tuple(role.name for role in TRAINED)
#: Where nodes of a job meet: below the ports that Linux gives to whoever asks for any (32768 and up).
FIRST_PORT, PORTS = 15_000, 10_000
#: That processes which train together are given at least to write their checkpoint in.
_CHECKPOINT_SECONDS = 60
#: In which all nodes have to come there.
MEETING_SECONDS = 600


def as_job(project: Project, name: str, key: str | None, arguments: list[str]) -> bool:
    """Run a training where `machine.launch` says; False where this machine is to do it.

    What takes no time stays here: a pretrained seed, which may come out of the network, and a dense model that is not
    asked for.

    Raises:
        ModeError: no such expert, or what `mode.slurm.waiting.run_as_job` says of the job.
    """
    params = project.params
    if params.machine.launch == "local" or name not in TRAININGS or "WORLD_SIZE" in os.environ:
        return False
    [role] = [role for role in TRAINED if role.name == name]
    if key is not None:
        (project.update if role is UPDATE else project.expert)(key)
    elif (role, None) not in params.trainings:
        return False
    from mode.slurm.waiting import run_as_job

    command = [sys.executable, "-m", "mode.cli", "stage", *arguments]
    run_as_job(role.model(key), command, params.machine, project.root)
    return True


def in_several_processes(machine: MachineParams, name: str, arguments: list[str]) -> bool:
    """Run a training in as many processes as `machine.processes` says; False where this process is to do it itself.

    Raises:
        ModeError: `torchrun` started a stage that is no training: each process would do all of it; or there are several
            machines (`machine.nodes`), but this is no job of Slurm that has them.
    """
    started = "WORLD_SIZE" in os.environ  # by torchrun, or by this very function
    if started and name not in TRAININGS and os.environ["WORLD_SIZE"] != "1":
        raise ModeError(f"stage {name} is no training", f"torchrun is for {', '.join(TRAININGS)}")
    if started or machine.processes * machine.nodes == 1 or name not in TRAININGS:
        return False
    if machine.nodes > 1 and os.environ.get("SLURM_STEP_NUM_NODES") != str(machine.nodes):
        raise ModeError(f"machine.nodes: {machine.nodes} machines, but this is no job that has them", "launch: slurm")
    if machine.device.startswith("cuda:"):
        raise ModeError(
            f"machine.processes: {machine.processes} processes, but one device, {machine.device}",
            "machine.device: auto gives each a GPU",
        )
    given = os.environ.get("OMP_NUM_THREADS", "")
    share = int(given) if given.isdecimal() and int(given) else cores()  # a flow gives a training its share
    threads = str(max(1, (machine.threads or share) // machine.processes))
    os.environ |= {"OMP_NUM_THREADS": threads, "MODE_THREADS": threads}
    _launch(machine, "-m", "mode.cli", "stage", *arguments)
    return True


def _launch(machine: MachineParams, *arguments: str) -> None:
    """What `torchrun` does, with errors in one line: `python ARGUMENTS` in several processes, here and on other nodes.

    A SIGTERM or SIGINT is passed on; once the processes have ended, this one does so with 143 or 130, as one training
    would. More signals change nothing: torch would leave at the third, and the processes alone with their checkpoint.

    Raises:
        ModeError: one of them failed; the others were stopped.
    """
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # It tells at length what the line below says.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    processes, nodes = machine.processes, machine.nodes
    signalled = None
    told: list[int] = []

    def tell_once(number: int, _: FrameType | None) -> None:
        told.append(number)
        if len(told) == 1:
            raise SignalException("told to stop", signal.Signals(number))

    with tempfile.TemporaryDirectory(prefix="mode-processes-", ignore_cleanup_errors=True) as folder:
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            **(_meeting() if nodes > 1 else _meeting_here(folder)),
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(),
            signals_to_handle="SIGHUP,SIGQUIT",  # the others are handled here
            # To write a checkpoint in, and to copy it; then they are killed.
            shutdown_timeout=max(_CHECKPOINT_SECONDS, math.ceil(machine.stop_seconds)),
        )
        try:
            with handling_signals(tell_once):
                elastic_launch(config, sys.executable)(*arguments)
        except SignalException as signal_given:
            signalled = signal_given.sigval
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            if failure.exitcode in (130, 143):  # told to stop, and did
                sys.exit(failure.exitcode)
            raise ModeError(
                f"process {rank} of {processes * nodes} ended with exit code {failure.exitcode}",
                "its own error stands above",
            ) from None
    if signalled is not None:
        # torch leaves the thread of its rendezvous running after a signal; an interpreter that shuts down around it
        # can abort (exit code -6) in place of this code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signalled)


def _meeting_here(folder: str) -> dict[str, Any]:
    """Where the processes of this machine meet: at a file in a folder of this user's.

    Not at a port: torch listens on all of a machine's addresses, and unpickles what anybody puts there.
    """
    return {
        "run_id": uuid.uuid4().hex,
        "rdzv_endpoint": str(Path(folder) / "store"),
        "rdzv_configs": {"store_type": "file"},
    }


def _meeting() -> dict[str, Any]:
    """Where the nodes of a step of Slurm meet: on its first node, at a port that follows from the job's number."""
    job, launcher = os.environ["SLURM_JOB_ID"], os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    first = os.environ["SLURM_NODEID"] == "0"
    return {
        "run_id": f"{job}-{os.environ.get('SLURM_RESTART_COUNT', '0')}",
        "rdzv_endpoint": f"{launcher}:{FIRST_PORT + int(job) % PORTS}",
        # Said, since a machine may not recognise itself by that address.
        "rdzv_configs": {"is_host": str(first).lower(), "timeout": MEETING_SECONDS},
        "local_addr": launcher if first else None,
    }


def open_engine(machine: MachineParams, gpus: int, alone: bool = False) -> AbstractContextManager[Engine]:
    """The engine that `machine.engine` asks for: a process per GPU, or per core; or one (`alone`)."""
    from mode.engine import open_engine

    return open_engine(machine.engine, 1 if alone else cores(), gpus)


def made_by_one(make: Callable[[], None], *folders: Path) -> None:
    """See to it that folders are there: the process that leads makes them, the others wait."""
    from mode.files import is_there

    if leads() and not all(map(is_there, folders)):
        make()
    while not all(folder.is_dir() for folder in folders):
        time.sleep(0.2)
