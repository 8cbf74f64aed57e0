"""What all flows do: take the project, ask DVC what is to do, run those stages, say how it ended."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows import artifacts, graph
from flows.devices import DevicePool, Machine, job_places, places_for
from flows.locks import Lock, holder, mark_alive, take
from flows.progress import Outcome, Progress
from flows.schedule import Schedule
from flows.stage import run_step
from mode.errors import ModeError
from mode.parallel import cores
from mode.params import load_params
from mode.paths import Paths
from mode.stages.project import Project
from mode.stages.sources import check_names


@dataclass(frozen=True)
class Work:
    """A project that this flow run holds; every command keeps the locks `held` until its last process has gone."""

    root: Path
    machine: Machine
    held: tuple[int, ...]

    def step(self, title: str, *command: str) -> None:
        """Run `python -m COMMAND` in the project as a task of its own."""
        run_step(title, list(command), self.held)

    def run(self, pick: Callable[[nx.DiGraph], nx.DiGraph]) -> Outcome:
        """Run the part of the pipeline that `pick` chooses of all of DVC's stages.

        Raises:
            ModeError: the pipeline cannot be read, or picked stages or devices are not there; nothing has started then.
        """
        machine = self.machine
        pool, jobs = pools_for(self.root, machine)
        pipeline, stale = graph.read(self.root)
        part = pick(pipeline)
        changing = [stage for stage in graph.in_order(part) if stage in stale]
        get_run_logger().info("%d stages, %d not up to date: %s", len(part), len(changing), ", ".join(changing) or "-")
        engine = engine_for(self.root, machine)
        return Schedule(self.root, Progress(part, stale), pool, jobs, machine, self.held, engine).run()

    def finish(self, outcome: Outcome, essential: bool = False) -> State[Any]:
        """Leave the results on the run's page and turn the stages' outcome into the run's state.

        A failed expert fails the run only if it is `essential`.
        """
        artifacts.publish(self.root, outcome)
        counted = f"{len(outcome.done)} stages run, {len(outcome.cached)} cached"
        reasons = "; ".join(f"{stage}: {reason}" for stage, reason in outcome.failed.items())
        if outcome.fatal or (essential and outcome.failed):
            left = f"; not tried: {', '.join(outcome.skipped)}" if outcome.skipped else ""
            return Failed(message=f"{reasons}{left} ({counted})")
        if lost := outcome.lost_experts:
            message = f"without {', '.join(lost)}: the seed stands in for {'it' if len(lost) == 1 else 'them'}"
            return Completed(name="Incomplete", message=f"{message} ({'; '.join(filter(None, [reasons, counted]))})")
        return Completed(message=counted)


@contextmanager
def work(machine: Machine) -> Iterator[Work]:
    """Hold the project in the current folder for this flow run.

    Raises `ModeError` if it is none or its params.yaml is not valid, or as `workspace`.
    """
    root = Path.cwd()
    if not Paths(root).dvc_file.is_file():
        raise ModeError(f"{root}: no dvc.yaml", "start the worker inside the project (`python -m flows.ui` does)")
    mark_alive(root)
    with workspace(root, machine.wait) as lock:
        # Before DVC, which removes whatever an output's name leads to, and only then runs the stage: models/../docs.
        check_names(Project(root, load_params(Paths(root).params_file)))
        yield Work(root, machine, (lock.fileno(),))


@contextmanager
def workspace(root: Path, wait: bool, poll_seconds: float = 1.0) -> Iterator[Lock]:
    """Hold a project's lock, which is to be handed to every stage.

    If the flow is killed, the next one must not start before the stages have written their checkpoints and gone.

    Where another flow holds it, `wait` for that flow's end, with a look every `poll_seconds`, or raise `ModeError`;
    either says who that is.
    """
    path = Paths(root).flow_lock
    me = f"{flow_run.get_flow_name()} run '{flow_run.get_name()}' ({socket.gethostname()}, process {os.getpid()})"
    told = ""
    while (lock := take(path, me)) is None:
        other = holder(path)
        if not wait:
            raise ModeError(f"this project is held by {other}", "wait for it or cancel it, or start with `wait` on")
        if other != told:
            get_run_logger().info("waiting: this project is held by %s", other)
            told = other
        time.sleep(poll_seconds)
    with lock:
        yield lock


def engine_for(root: Path, machine: Machine) -> str:
    """Where captions are embedded and assigned: what the form says, or else the environment or params.yaml."""
    return machine.engine or load_params(Paths(root).params_file).machine.engine


def pools_for(root: Path, machine: Machine) -> tuple[DevicePool, DevicePool | None]:
    """Places on this machine, and for trainings those of the scheduler that the form, or else params.yaml, says.

    Raises:
        ModeError: a device that is not there, or that only this machine or only a scheduler has.
    """
    scheduler = machine.scheduler or load_params(Paths(root).params_file).machine.launch
    if scheduler == "slurm":
        jobs = DevicePool(job_places(machine, root), 0)
        return DevicePool(places_for(machine.devices, machine.workers, machine.per_device, root), cores()), jobs
    if machine.nodes_per_training > 1:
        raise ModeError(
            f"nodes_per_training: {machine.nodes_per_training} on one machine", "set scheduler to `slurm`, or this to 1"
        )
    together = machine.gpus_per_training
    return DevicePool(places_for(machine.devices, machine.workers, machine.per_device, root, together), cores()), None
