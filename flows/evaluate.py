"""The ensemble and its evaluation at any moment, with the experts that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.graph import Graph, read
from flows.parameters import Machine
from flows.stage import project_root, run_step
from flows.work import finish, run_part
from flows.workspace import mark_alive, workspace

STAGES = ("ensemble", "evaluate", "report")


@flow(name="evaluate", validate_parameters=True, persist_result=False)
def evaluate(remote: bool = False, machine: Machine = Machine()) -> State[Any]:  # noqa: B008
    """Join, evaluate and report the experts that are there now; the seed stands in for the others. Trains nothing.

    Args:
        remote: First take over the experts that other machines have pushed to the DVC remote.
        machine: Where the evaluation runs, and how it is tried again.
    """
    root = project_root()
    mark_alive(root)
    absent: list[str] = []

    def pick(graph: Graph) -> Graph:
        absent.extend(missing_experts(root, graph))
        return graph.only([stage for stage in STAGES if stage in graph.needs])

    with workspace(root, machine.wait) as lock:
        held = (lock.descriptor,)
        if remote:
            pipeline = read(root)[0]
            experts = [stage for stage in pipeline.needs if stage.startswith("expert@")]
            run_step("fetch", ["flows.remote", "fetch", *pipeline.upto(experts).needs], held)
        outcome = run_part(root, pick, machine, held)
        outcome.absent = absent
        return finish(root, outcome)


def missing_experts(root: Path, graph: Graph) -> list[str]:
    """Experts of the pipeline that have no model yet."""
    names = [stage.removeprefix("expert@") for stage in graph.needs if stage.startswith("expert@")]
    return [name for name in names if not (root / "models" / name).exists()]
