"""What all flows do: take the project, ask DVC what is to do, run those stages, say how it ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import artifacts, graph
from flows.devices import DevicePool, cpu_cores, places_for
from flows.graph import Graph
from flows.parameters import Machine
from flows.schedule import Outcome, Retries, Schedule

Pick = Callable[[Graph], Graph]


def run_part(root: Path, pick: Pick, machine: Machine, held: tuple[int, ...]) -> Outcome:
    """Run the part of the pipeline that `pick` chooses of it.

    Args:
        root: of the project, held by this flow.
        pick: from all of DVC's stages to those to run.
        machine: where, and how often they are tried again.
        held: locks that every stage keeps until its last process has gone.

    Raises:
        ModeError: the pipeline cannot be read, or picked stages or devices are not there; nothing has started then.
    """
    pool = DevicePool(places_for(machine.devices, machine.workers, machine.per_device, root), cpu_cores())
    pipeline, stale = graph.read(root)
    part = pick(pipeline)
    changing = [stage for stage in part.needs if stage in stale]
    get_run_logger().info(
        "%d stages, %d not up to date: %s", len(part.needs), len(changing), ", ".join(changing) or "-"
    )
    retries = Retries(machine.retries, machine.retry_delay)
    return Schedule(root, part, stale, pool, retries, held, engine=machine.engine).run()


def finish(root: Path, outcome: Outcome, essential: bool = False) -> State[Any]:
    """Leave the results on the run's page and turn the stages' outcome into the run's state.

    Args:
        root: of the project.
        outcome: of the stages.
        essential: a failed expert fails the run.
    """
    artifacts.publish(root, outcome)
    counted = f"{len(outcome.done)} stages run, {len(outcome.cached)} cached"
    reasons = "; ".join(f"{stage}: {reason}" for stage, reason in outcome.failed.items())
    if outcome.fatal or (essential and outcome.failed):
        left = f"; not tried: {', '.join(outcome.skipped)}" if outcome.skipped else ""
        return Failed(message=f"{reasons}{left} ({counted})")
    if lost := outcome.lost_experts:
        message = f"without {', '.join(lost)}: the seed stands in for {'it' if len(lost) == 1 else 'them'}"
        return Completed(name="Incomplete", message=f"{message} ({'; '.join(filter(None, [reasons, counted]))})")
    return Completed(message=counted)
