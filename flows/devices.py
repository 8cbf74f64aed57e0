"""Who may compute where: what the flows' forms ask of a machine, and its slots on GPUs or on the cores.

A slot is a lock file (see `flows.locks`), not a Prefect concurrency limit: a limit is a number in a database, and stays
used up when a worker is killed. A slot's lock is handed to the stage's supervisor, so it is free exactly when the last
process of the training has gone, also when the flow itself was killed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from flows.locks import Lock, take
from mode.errors import ModeError
from mode.paths import Paths

Gpu = Annotated[int, Field(ge=0)]
Devices = Literal["auto", "cpu"] | list[Gpu]
#: Of a source or an expert.
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]


class Machine(BaseModel):
    """Where trainings run, and how they are tried again."""

    model_config = ConfigDict(extra="forbid", title="Machine", use_attribute_docstrings=True)

    devices: Devices = "auto"
    """auto: every GPU of the worker's machine, or else its CPU; cpu; or GPUs by number: [0, 1]."""
    workers: int = Field(default=2, ge=1, le=64)
    """Trainings side by side on the CPU; its threads are divided among them unless params.yaml says."""
    per_device: int = Field(default=1, ge=1, le=8)
    """Trainings on one GPU at a time."""
    # No address: the project's data goes to a scheduler that params.yaml names, and to no other.
    engine: Literal["", "local", "dask"] = ""
    """Where captions are embedded and assigned: local; dask: processes on the worker's machine; empty: as params.yaml
    says, where a Dask scheduler may be named. The result is the same."""
    retries: int = Field(default=2, ge=0, le=10)
    """Times that a failing stage is tried again, from its last checkpoint."""
    retry_delay: float = Field(default=5.0, ge=0, le=3600)
    """Seconds before it is tried again."""
    wait: bool = True
    """If another flow works on this project: wait for it to end. Otherwise fail and say which one."""


class Place(NamedTuple):
    """Where one training fits: a device as torch names it (`cpu`, `cuda:1`), and the lock that permits its use."""

    device: str
    lock: Path


class Slot(NamedTuple):
    """A place that is taken. Closing the lock frees it once the processes that were handed it have ended."""

    place: Place
    lock: Lock


@dataclass(frozen=True)
class DevicePool:
    """The places of a flow run, in order of preference, and the cores to divide among trainings side by side."""

    places: list[Place]
    cores: int

    def take(self, holder: str) -> Slot | None:
        """A free place, locked; `None` if there is none at present."""
        for place in self.places:
            if lock := take(place.lock, holder):
                return Slot(place, lock)
        return None

    def threads(self, alone: bool) -> int:
        """Threads for one training: all cores if it runs alone, else an equal part."""
        return self.cores if alone else max(1, self.cores // len(self.places))


def places_for(devices: Devices, workers: int, per_device: int, root: Path) -> list[Place]:
    """The places that a flow's parameters name.

    Args:
        devices: `auto` (every GPU there is, else the CPU), `cpu`, or GPUs by number as CUDA counts them.
        workers: trainings side by side on the CPU.
        per_device: trainings on one GPU.
        root: of the project. Places on the CPU belong to it; a GPU is locked for the whole machine (and user).

    Raises:
        ModeError: a GPU is named twice, or is not there.
    """
    visible = visible_gpus()
    if devices == "cpu" or (devices == "auto" and not visible):
        return [Place("cpu", Paths(root).cpu_locks / f"cpu-{number}") for number in range(workers)]
    chosen = list(range(len(visible))) if devices == "auto" else list(devices)
    if not chosen:
        raise ModeError("devices: an empty list", "`auto`, `cpu`, or numbers of GPUs such as [0, 1]")
    if len(set(chosen)) < len(chosen):
        raise ModeError(f"devices: {chosen} names a GPU twice", "`per_device` puts several trainings on one")
    missing = [number for number in chosen if number >= len(visible)]
    if missing:
        raise ModeError(f"devices: no GPU {missing[0]} here", f"this machine shows {len(visible)}; `cpu` needs none")
    # Shared by all projects of a user on this machine.
    locks = Path(os.environ.get("MODE_LOCKS") or Path(tempfile.gettempdir()) / f"mode-locks-{os.getuid()}")
    # All first trainings come before the second ones, so that GPUs are shared only when all are in use.
    return [
        Place(f"cuda:{number}", locks / f"gpu-{visible[number]}-{turn}")
        for turn in range(per_device)
        for number in chosen
    ]


def visible_gpus() -> list[str]:
    """Names of the GPUs that CUDA shows, in its order; from the driver's tool, since importing torch takes seconds."""
    restricted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if restricted is not None:
        return [name.strip() for name in restricted.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def stage_settings(device: str, threads: int, engine: str) -> dict[str, str]:
    """What a stage's environment says of the machine.

    The share of threads is OpenMP's word, which torch takes as its default: a number in params.yaml decides the bits of
    a training, and has to win.

    Args:
        device: where it computes, as torch names it; empty: as params.yaml says.
        threads: CPU threads for a training where params.yaml leaves them open; 0: as many as it takes.
        engine: where it spreads blocks of captions, if it does; empty: as params.yaml says.
    """
    settings = {"MODE_DEVICE": device, "OMP_NUM_THREADS": str(threads or ""), "MODE_ENGINE": engine}
    if device == "cpu":
        # Threads that spin while they wait bring two computations on the same cores nearly to a stop.
        settings |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    return {name: value for name, value in settings.items() if value}
