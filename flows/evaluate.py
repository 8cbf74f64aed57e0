"""The ensemble and its evaluation at any moment, with the experts that are there."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows import graph
from flows.devices import Machine
from flows.work import work
from mode import roles
from mode.params import load_params
from mode.paths import Paths

#: What comes after the experts.
STAGES = (roles.ENSEMBLE.name, "evaluate", "report")


@flow(name="evaluate", validate_parameters=True, persist_result=False)
def evaluate(remote: bool = False, machine: Machine = Machine()) -> State[Any]:  # noqa: B008
    """Join, evaluate and report the experts that are there now; the seed stands in for the others. Trains nothing.

    Args:
        remote: First take over the experts that other machines have pushed to the DVC remote.
        machine: Where the evaluation runs, and how it is tried again.
    """
    with work(machine) as here:
        experts = list(load_params(Paths(here.root).params_file).members)
        if remote:
            pipeline = graph.read(here.root)[0]
            needed = graph.upto(pipeline, [graph.stage_of(pipeline, name) for name in experts])
            here.step("fetch", "flows.remote", "fetch", *graph.in_order(needed))
        absent = [name for name in experts if not Paths(here.root).model(name).exists()]
        outcome = here.run(lambda pipeline: pipeline.subgraph(STAGES))
        outcome.absent = absent
        return here.finish(outcome)
