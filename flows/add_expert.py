"""New shards, new experts: the old models, clusters and assignments stay as they are."""

from __future__ import annotations

from typing import Annotated, Any

import networkx as nx
from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import Field

from flows import graph
from flows.devices import Machine, Name
from flows.evaluate import STAGES
from flows.work import work
from mode.errors import ModeError
from mode.params import Params, load_params
from mode.paths import Paths


@flow(name="add-expert", validate_parameters=True, persist_result=False)
def add_expert(
    name: Name,
    shards: Annotated[str, Field(min_length=1)],
    experts: Annotated[int, Field(ge=1, le=1024)] = 1,
    machine: Machine = Machine(),  # noqa: B008
) -> State[Any]:
    """Add a source of shards, indexed, embedded and clustered by itself, and train experts for it from the same seed.

    Runs only the stages that the source brings, and then the ensemble, its evaluation and the report. A source of this
    name that is there already, with the same shards, is gone on with (after a cancel, say).

    Args:
        name: Name of the new source, such as medical: lower-case letters, digits, dots and dashes.
        shards: A folder of tars, a glob of tars, or a csv, tsv or parquet table, on the worker's machine.
        experts: Number of new experts: the source is divided into as many clusters.
        machine: Where trainings run, and how they are tried again.
    """
    with work(machine) as here:
        path = Paths(here.root).params_file
        if not is_known(load_params(path), name, shards):
            here.step(f"add source {name}", *adding(name, shards, experts))
        new = [key for key, expert in load_params(path).experts.items() if expert.source == name]
        return here.finish(here.run(lambda pipeline: part_for(pipeline, new)))


def adding(name: str, shards: str, experts: int) -> list[str]:
    """The module and arguments that add a source; behind `--` nothing is taken for an option."""
    return ["mode.cli", "add-source", "--experts", str(experts), "--", name, shards]


def is_known(params: Params, name: str, shards: str) -> bool:
    """Whether params.yaml has this source already. Raises `ModeError` if it has one of this name with other shards."""
    source = params.sources.get(name)
    if source is not None and source.shards != shards:
        raise ModeError(f"source '{name}' is there already: {source.shards}", "choose another name")
    return source is not None


def part_for(pipeline: nx.DiGraph, experts: list[str]) -> nx.DiGraph:
    """What makes the new experts, then ensemble, evaluation and report; no other expert is trained."""
    stages = [graph.stage_of(pipeline, name) for name in experts]
    return pipeline.subgraph([*graph.upto(pipeline, stages), "tasks", *STAGES])
