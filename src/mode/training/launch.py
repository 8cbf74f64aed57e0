"""One training in several processes of this machine: what `torchrun --standalone` does, with errors in one line."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mode.errors import ModeError

#: Seconds in which the processes have to write a checkpoint when they are told to stop; then they are killed.
GRACE = 60
#: Exit codes of a process that was told to stop and did.
STOPPED = (130, 143)


def launch(processes: int, module: str, arguments: Sequence[str]) -> None:
    """Run `python -m MODULE ARGUMENTS` in several processes that find one another, and wait for all.

    A SIGTERM or SIGINT is passed on; this process then ends at once with 143 or 130, as one training would.

    Args:
        processes: how many; each trains on a GPU of its number if there are GPUs.
        module, arguments: what each runs.

    Raises:
        ModeError: one of them failed; the others were stopped.
    """
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
        shutdown_timeout=GRACE,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except SignalException as told:
        # torch leaves the thread of its rendezvous running after a signal; an interpreter that shuts down around it
        # can abort (exit code -6) in place of this code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + told.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode in STOPPED:
            sys.exit(failure.exitcode)
        raise ModeError(
            f"process {rank} of {processes} ended with exit code {failure.exitcode}", "its own error stands above"
        ) from None


def share_threads(processes: int, threads: int) -> None:
    """Divide CPU threads among the processes that this one is going to start."""
    each = str(max(1, threads // processes))
    os.environ |= {"OMP_NUM_THREADS": each, "MODE_THREADS": each}
