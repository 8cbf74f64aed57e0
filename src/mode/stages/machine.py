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
    from mode.training.launch import launch, share_threads

    share_threads(machine.processes, machine.threads or cores())
    launch(machine.processes, "mode.cli", ["stage", *arguments])
    return True


def open_engine(machine: MachineParams, gpus: int, alone: bool = False) -> AbstractContextManager[Engine]:
    """The engine that `machine.engine` asks for: a process per GPU, or per core; or one (`alone`)."""
    from mode.engine import open_engine

    return open_engine(machine.engine, 1 if alone else cores(), gpus)


def gpus_for(device: str) -> int:
    """GPUs to spread a neural encoder over; 0 for the CPU, or if one GPU is named."""
    import torch

    return torch.cuda.device_count() if device in ("auto", "cuda") else 0
