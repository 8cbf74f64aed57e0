"""One expert, or a few, now: with what they need, and without the others."""

from __future__ import annotations

from typing import Annotated, Any

import networkx as nx
from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import Field

from flows import graph
from flows.devices import Machine, Name
from flows.work import Work, work
from mode.errors import ModeError
from mode.params import load_params
from mode.paths import Paths


@flow(name="train-expert", validate_parameters=True, persist_result=False)
def train_expert(
    experts: Annotated[list[Name], Field(min_length=1)],
    update: bool = False,
    remote: bool = False,
    machine: Machine = Machine(),  # noqa: B008
) -> State[Any]:
    """Train experts of params.yaml, and first whatever they need that is not up to date.

    Args:
        experts: Names of the experts, such as expert-0.
        update: Train them on with pairs that have arrived since (`mode update-expert`), once for each arrival that
            they have not seen.
        remote: Fetch what they need from the DVC remote first, as far as another machine has made it, and push what
            is made here.
        machine: Where trainings run, and how they are tried again.
    """
    with work(machine) as here:
        if update:
            experts = updated(here, experts)
        needed = graph.in_order(part_for(graph.read(here.root)[0], experts))
        if remote:
            here.step("fetch", "flows.remote", "fetch", *needed)
        outcome = here.run(lambda pipeline: part_for(pipeline, experts))
        made = [stage for stage in needed if stage in (*outcome.done, *outcome.cached)]
        if remote and made:
            here.step("push", "flows.remote", "push", *made)
        return here.finish(outcome, essential=True)


def updated(here: Work, experts: list[str]) -> list[str]:
    """Enter the updates of experts; the names of their newest versions. Those that are entered already stay."""
    file = Paths(here.root).params_file
    for name in experts:
        before = load_params(file)
        versions = before.versions_of(name)
        if not versions:
            raise ModeError(f"no expert is called '{name}'", f"params.yaml has: {', '.join(before.experts)}")
        if before.unseen_by(name):
            here.step(f"update {name}", "mode.cli", "update-expert", "--", name)
        elif len(versions) == 1:
            raise ModeError(f"{name}: nothing has arrived that it has not seen", "`mode arrivals SOURCE` looks for it")
    params = load_params(file)
    return [params.versions_of(name)[-1] for name in experts]


def part_for(pipeline: nx.DiGraph, experts: list[str]) -> nx.DiGraph:
    """The part of the pipeline that makes these experts. Raises `ModeError` if there is no such expert."""
    known = graph.experts_of(pipeline)
    for name in experts:
        if name not in known:
            raise ModeError(f"no expert is called '{name}'", f"params.yaml has: {', '.join(known) or 'none'}")
    return graph.upto(pipeline, [graph.stage_of(pipeline, name) for name in experts])
