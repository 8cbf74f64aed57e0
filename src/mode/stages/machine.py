"""What the machine gives a stage: processes that train together, an engine for blocks of very many pairs."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from mode.errors import ModeError
from mode.parallel import cores
from mode.params import MachineParams
from mode.roles import TRAINED

if TYPE_CHECKING:
    from mode.engine import Engine

#: Stages that several processes can do together.
TRAININGS = tuple(role.name for role in TRAINED)


def in_several_processes(machine: MachineParams, name: str, arguments: list[str]) -> bool:
    """Run a training in as many processes as `machine.processes` says; False where this process is to do it itself.

    Raises:
        ModeError: `torchrun` started a stage that is no training: each process would do all of it.
    """
    started = "WORLD_SIZE" in os.environ  # by torchrun, or by this very function
    if started and name not in TRAININGS and os.environ["WORLD_SIZE"] != "1":
        raise ModeError(f"stage {name} is no training", f"torchrun is for {', '.join(TRAININGS)}")
    if started or machine.processes == 1 or name not in TRAININGS:
        return False
    if machine.device.startswith("cuda:"):
        raise ModeError(
            f"machine.processes: {machine.processes} processes, but one device, {machine.device}",
            "machine.device: auto gives each a GPU",
        )
    threads = str(max(1, (machine.threads or cores()) // machine.processes))
    os.environ |= {"OMP_NUM_THREADS": threads, "MODE_THREADS": threads}
    _launch(machine.processes, "-m", "mode.cli", "stage", *arguments)
    return True


def _launch(processes: int, *arguments: str) -> None:
    """What `torchrun --standalone` does, with errors in one line: `python ARGUMENTS` in several processes.

    A SIGTERM or SIGINT is passed on; this process then ends at once with 143 or 130, as one training would.

    Raises:
        ModeError: one of them failed; the others were stopped.
    """
    import logging
    import sys
    import uuid

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # It tells at length what the line below says.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
        shutdown_timeout=60,  # seconds to write a checkpoint in; then they are killed
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except SignalException as told:
        # torch leaves the thread of its rendezvous running after a signal; an interpreter that shuts down around it
        # can abort (exit code -6) in place of this code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + told.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode in (130, 143):  # told to stop, and did
            sys.exit(failure.exitcode)
        raise ModeError(
            f"process {rank} of {processes} ended with exit code {failure.exitcode}", "its own error stands above"
        ) from None


def open_engine(machine: MachineParams, gpus: int, alone: bool = False) -> AbstractContextManager[Engine]:
    """The engine that `machine.engine` asks for: a process per GPU, or per core; or one (`alone`)."""
    from mode.engine import open_engine

    return open_engine(machine.engine, 1 if alone else cores(), gpus)
