"""Who may compute where: what the flows' forms ask of a machine, and its slots on GPUs, on the cores or in a queue.

A slot is a lock file (see `flows.locks`), not a Prefect concurrency limit: a limit is a number in a database, and stays
used up when a worker is killed. A slot's lock is handed to the stage's supervisor, so it is free exactly when the last
process of the training has gone, also when the flow itself was killed.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from flows.locks import Lock, holder, take
from mode import params
from mode.errors import ModeError
from mode.params import SlurmParams
from mode.paths import Paths

Gpu = Annotated[int, Field(ge=0)]
Devices = Literal["auto", "cpu"] | list[Gpu]
#: Of a source or an expert.
Name = Annotated[params.Name, Field(max_length=64)]


class Machine(BaseModel):
    """Where trainings run, and how they are tried again."""

    model_config = ConfigDict(extra="forbid", title="Machine", use_attribute_docstrings=True)

    devices: Devices = "auto"
    """auto: every GPU of the worker's machine, or else its CPU; cpu; or GPUs by number: [0, 1]."""
    workers: int = Field(default=2, ge=1, le=64)
    """Trainings side by side on the CPU; its threads are divided among them unless params.yaml says. Or jobs of a
    scheduler at a time."""
    per_device: int = Field(default=1, ge=1, le=8)
    """Trainings on one GPU at a time."""
    gpus_per_training: int = Field(default=1, ge=1, le=64)
    """GPUs that train one model together; of a job, those of each node. GPUs of this machine that are left over stay
    idle."""
    nodes_per_training: int = Field(default=1, ge=1, le=64)
    """Machines that train one model together, as a job of a scheduler."""
    scheduler: Literal["", "local", "slurm"] = ""
    """Where trainings run: local, on the worker's machine; slurm, each as a job of Slurm; empty: as params.yaml says.
    Everything else runs on the worker's machine."""
    slurm: SlurmParams = SlurmParams()
    """What Slurm is asked for; left as it is: what params.yaml says."""
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


@dataclass(frozen=True)
class Place:
    """Where one training fits.

    Attributes:
        device: for people, such as `cpu`, `cuda:1`, `cuda:2,3`, or `slurm`.
        locks: the files that permit its use, of each GPU one.
        settings: what a stage's environment says of it.
    """

    device: str
    locks: tuple[Path, ...]
    settings: Mapping[str, str]

    def take(self, holder: str) -> Slot | None:
        """The place, locked; `None` if any of it is taken."""
        taken: list[Lock] = []
        for path in self.locks:
            if (lock := take(path, holder)) is None:
                Slot(self, tuple(taken)).free()
                return None
            taken.append(lock)
        return Slot(self, tuple(taken))

    def holders(self) -> str:
        """Who holds it, or held it last."""
        return ", ".join(sorted({holder(path) for path in self.locks}))


class Slot(NamedTuple):
    """A place that is taken. It is free again once its locks are closed, and the processes with them have ended."""

    place: Place
    locks: tuple[Lock, ...]

    def free(self) -> None:
        """Close the locks here."""
        for lock in self.locks:
            lock.close()


@dataclass(frozen=True)
class DevicePool:
    """The places of a flow run, in order of preference, and the cores to divide among trainings side by side.

    Cores are 0 where others divide them.
    """

    places: list[Place]
    cores: int

    def take(self, holder: str) -> Slot | None:
        """A free place, locked; `None` if there is none at present."""
        return next((slot for place in self.places if (slot := place.take(holder))), None)

    def threads(self, alone: bool) -> int:
        """Threads for one training: all cores if it runs alone, else an equal part; 0: not for this pool to say."""
        if not self.cores:
            return 0
        return self.cores if alone else max(1, self.cores // len(self.places))


def places_for(devices: Devices, workers: int, per_device: int, root: Path, together: int = 1) -> list[Place]:
    """The places that a flow's parameters name.

    Args:
        devices: `auto` (every GPU there is, else the CPU), `cpu`, or GPUs by number as CUDA counts them.
        workers: trainings side by side on the CPU.
        per_device: trainings on one GPU.
        root: of the project. Places on the CPU belong to it; a GPU is locked for the whole machine (and user).
        together: GPUs that train one model together: neighbours in the order that they are given in, each in one group.

    Raises:
        ModeError: a GPU is named twice, or is not there, or there are too few for one training; or the folder of their
            locks is somebody else's.
    """
    visible = visible_gpus()
    if devices == "cpu" or (devices == "auto" and not visible):
        if together > 1:
            raise ModeError(f"gpus_per_training: {together}, but trainings run on the CPU here", "set it to 1")
        return [
            Place("cpu", (Paths(root).cpu_locks / f"cpu-{number}",), {**HERE, "MODE_DEVICE": "cpu", **PATIENT_THREADS})
            for number in range(workers)
        ]
    chosen = list(range(len(visible))) if devices == "auto" else list(devices)
    if not chosen:
        raise ModeError("devices: an empty list", "`auto`, `cpu`, or numbers of GPUs such as [0, 1]")
    if len(set(chosen)) < len(chosen):
        raise ModeError(f"devices: {chosen} names a GPU twice", "`per_device` puts several trainings on one")
    missing = [number for number in chosen if number >= len(visible)]
    if missing:
        raise ModeError(f"devices: no GPU {missing[0]} here", f"this machine shows {len(visible)}; `cpu` needs none")
    if together > len(chosen):
        raise ModeError(
            f"gpus_per_training: {together}, but there are {len(chosen)} devices", "lower it, or name more `devices`"
        )
    locks = _locks_of_gpus()
    groups = [chosen[first : first + together] for first in range(0, len(chosen) - together + 1, together)]
    # All first trainings come before the second ones, so that GPUs are shared only when all are in use.
    return [
        Place(
            f"cuda:{','.join(map(str, group))}",
            tuple(locks / f"gpu-{visible[number]}-{turn}" for number in group),
            _gpu_settings(group, visible),
        )
        for turn in range(per_device)
        for group in groups
    ]


def _locks_of_gpus() -> Path:
    """The folder of the locks that all projects of a user on this machine share: MODE_LOCKS, or one beside all users'.

    There anybody may have made it first, with links in it to files of this user, which a lock would empty.
    """
    if given := os.environ.get("MODE_LOCKS"):
        return Path(given)
    folder = Path(tempfile.gettempdir()) / f"mode-locks-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ModeError(f"{folder}: somebody else has made it", "set MODE_LOCKS to a folder of your own")
    return folder


def _gpu_settings(group: list[int], visible: list[str]) -> dict[str, str]:
    """A device by its number; several as all that a stage sees, one for each of its processes."""
    if len(group) == 1:
        return {**HERE, "MODE_DEVICE": f"cuda:{group[0]}"}
    seen = ",".join(visible[number] for number in group)
    return {**HERE, "MODE_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": seen, "MODE_PROCESSES": str(len(group))}


def job_places(machine: Machine, root: Path) -> list[Place]:
    """Places in the queue of a scheduler, for as many jobs as the form has `workers`.

    Raises:
        ModeError: the form asks for what only this machine has.
    """
    if isinstance(machine.devices, list):
        raise ModeError(
            f"devices: {machine.devices}, but a scheduler chooses the GPUs", "set `auto`, or `cpu` for none"
        )
    if machine.devices == "cpu" and machine.gpus_per_training > 1:
        raise ModeError(
            f"gpus_per_training: {machine.gpus_per_training}, but devices: cpu",
            "set devices to `auto`, or gpus_per_training to 1",
        )
    settings = {"MODE_LAUNCH": "slurm"}
    if machine.devices == "cpu":
        settings["MODE_DEVICE"] = "cpu"
    if machine.gpus_per_training > 1:
        settings["MODE_PROCESSES"] = str(machine.gpus_per_training)
    if machine.nodes_per_training > 1:
        settings["MODE_NODES"] = str(machine.nodes_per_training)
    if machine.slurm != SlurmParams():
        settings["MODE_SLURM"] = machine.slurm.model_dump_json(exclude_defaults=True)
    return [Place("slurm", (Paths(root).cpu_locks / f"slurm-{number}",), settings) for number in range(machine.workers)]


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


#: A place on this machine is used here, whatever params.yaml says of a scheduler.
HERE = {"MODE_LAUNCH": "local"}
#: Threads that spin while they wait bring two computations on the same cores nearly to a stop.
PATIENT_THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def stage_settings(place: Mapping[str, str], threads: int, engine: str) -> dict[str, str]:
    """What a stage's environment says of the machine.

    The share of threads is OpenMP's word, which torch takes as its default: a number in params.yaml decides the bits of
    a training, and has to win.

    Args:
        place: the settings of its place; empty: it computes where params.yaml says.
        threads: CPU threads for a training where params.yaml leaves them open; 0: as many as it takes.
        engine: where it spreads blocks of captions, if it does; empty: as params.yaml says.
    """
    settings = {"OMP_NUM_THREADS": str(threads or ""), "MODE_ENGINE": engine, **place}
    return {name: value for name, value in settings.items() if value}
