"""One expert, or a few, now: with what they need, and without the others."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import Field

from flows.graph import Graph, read
from flows.parameters import Machine, Name
from flows.stage import project_root, run_step
from flows.work import finish, run_part
from flows.workspace import mark_alive, workspace
from mode.errors import ModeError


@flow(name="train-expert", validate_parameters=True, persist_result=False)
def train_expert(
    experts: Annotated[list[Name], Field(min_length=1)],
    remote: bool = False,
    machine: Machine = Machine(),  # noqa: B008
) -> State[Any]:
    """Train experts of params.yaml, and first whatever they need that is not up to date.

    Args:
        experts: Names of the experts, such as expert-0.
        remote: Fetch what they need from the DVC remote first, as far as another machine has made it, and push what
            is made here.
        machine: Where trainings run, and how they are tried again.
    """
    root = project_root()
    mark_alive(root)
    stages = [f"expert@{name}" for name in dict.fromkeys(experts)]
    with workspace(root, machine.wait) as lock:
        held = (lock.descriptor,)
        needed = list(experts_of(read(root)[0], stages).needs)
        if remote:
            run_step("fetch", ["flows.remote", "fetch", *needed], held)
        outcome = run_part(root, lambda graph: experts_of(graph, stages), machine, held)
        made = [stage for stage in needed if stage in (*outcome.done, *outcome.cached)]
        if remote and made:
            run_step("push", ["flows.remote", "push", *made], held)
        return finish(root, outcome, essential=True)


def experts_of(graph: Graph, stages: list[str]) -> Graph:
    """The part of the pipeline that makes these experts. Raises `ModeError` if there is no such expert."""
    known = [stage for stage in graph.needs if stage.startswith("expert@")]
    for stage in stages:
        if stage not in known:
            names = ", ".join(name.removeprefix("expert@") for name in known)
            raise ModeError(
                f"no expert is called '{stage.removeprefix('expert@')}'", f"params.yaml has: {names or 'none'}"
            )
    return graph.upto(stages)
