"""New shards, new experts: the old models, clusters and assignments stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from prefect import flow
from prefect.client.schemas.objects import State
from pydantic import Field

from flows.graph import Graph
from flows.parameters import Machine, Name
from flows.stage import project_root, run_step
from flows.work import finish, run_part
from flows.workspace import mark_alive, workspace
from mode.errors import ModeError


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
    root = project_root()
    mark_alive(root)
    with workspace(root, machine.wait) as lock:
        held = (lock.descriptor,)
        if not is_known(root, name, shards):
            run_step(f"add source {name}", ["mode.cli", "add-source", name, shards, "--experts", str(experts)], held)
        new = experts_of_source(root, name)
        outcome = run_part(root, lambda graph: part_for(graph, new), machine, held)
        return finish(root, outcome)


def is_known(root: Path, name: str, shards: str) -> bool:
    """Whether params.yaml has this source already.

    Raises:
        ModeError: it has one of this name with other shards.
    """
    source = _params(root).get("sources", {}).get(name)
    if source is not None and source.get("shards") != shards:
        raise ModeError(f"source '{name}' is there already: {source.get('shards')}", "choose another name")
    return source is not None


def experts_of_source(root: Path, name: str) -> list[str]:
    """Experts of params.yaml that a source has."""
    return [key for key, expert in _params(root).get("experts", {}).items() if expert.get("source", "base") == name]


def part_for(graph: Graph, experts: list[str]) -> Graph:
    """What makes the new experts, then ensemble, evaluation and report; no other expert is trained."""
    made = graph.upto([f"expert@{expert}" for expert in experts]).needs
    after = [stage for stage in graph.needs if stage in ("tasks", "ensemble", "evaluate", "report")]
    return graph.only([*made, *after])


def _params(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
    return content
