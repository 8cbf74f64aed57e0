"""What the machine, or a scheduler on it, gives a stage: device, threads, processes, an engine."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from mode.errors import ModeError
from mode.params import TrainingParams
from mode.stages.project import Project

if TYPE_CHECKING:
    from mode.engine import Engine

#: Stages that several processes can do together.
TRAININGS = ("seed", "dense", "dense-long", "expert")


def in_several_processes(project: Project, name: str, arguments: list[str]) -> bool:
    """Run a training as the environment's MODE_PROCESSES says; False where this process is to do it itself.

    Raises:
        ModeError: `torchrun` started a stage that is no training: each process would do all of it.
    """
    processes = _number_from("MODE_PROCESSES") or 1
    started = "WORLD_SIZE" in os.environ  # by torchrun, or by this very function
    if started and name not in TRAININGS and os.environ["WORLD_SIZE"] != "1":
        raise ModeError(f"stage {name} is no training", f"torchrun is for {', '.join(TRAININGS)}")
    if started or processes == 1 or name not in TRAININGS:
        return False
    device = os.environ.get("MODE_DEVICE") or project.params.training.device
    if device.startswith("cuda:"):
        raise ModeError(
            f"MODE_PROCESSES: {processes} processes, but one device, {device}", "training.device: auto gives each a GPU"
        )
    from mode.parallel import cores
    from mode.training.launch import launch, share_threads

    share_threads(processes, _number_from("MODE_THREADS") or project.params.training.threads or cores())
    launch(processes, "mode.cli", ["stage", *arguments])
    return True


def on_this_machine(training: TrainingParams) -> TrainingParams:
    """`training` with the device, and where it names none the threads, that a scheduler gave this process."""
    threads = _number_from("MODE_THREADS")
    given = {"device": os.environ.get("MODE_DEVICE"), "threads": threads if training.threads is None else None}
    return training.model_copy(update={key: value for key, value in given.items() if value})


def _number_from(variable: str) -> int | None:
    """A positive whole number from the environment; None if the variable is not set."""
    text = os.environ.get(variable)
    if text is not None and not (text.isdecimal() and int(text) > 0):
        raise ModeError(f"{variable}: '{text}' is not a whole number above 0")
    return int(text) if text else None


def _engine_setting() -> str:
    """Where blocks of very many pairs are computed. It changes no result, hence is no parameter."""
    return os.environ.get("MODE_ENGINE") or "local"


def open_engine(gpus: int, alone: bool = False) -> AbstractContextManager[Engine]:
    """The engine that the environment asks for: a process per GPU, or per thread; or one (`alone`)."""
    from mode.engine import open_engine
    from mode.parallel import cores

    processes = 1 if alone else _number_from("MODE_THREADS") or cores()
    return open_engine(_engine_setting(), processes, gpus)


def _gpus_for(device: str) -> int:
    """GPUs to spread a neural encoder over; 0 for the CPU, or if one GPU is named."""
    import torch

    return torch.cuda.device_count() if device in ("auto", "cuda") else 0
