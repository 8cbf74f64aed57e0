"""An experiment of experiments/*.yaml: its runs side by side, each in a clone of the project; see `flows.runs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field

from flows.devices import Name
from flows.locks import mark_alive
from flows.stage import run_step
from mode.errors import ModeError
from mode.experiments.definition import RandomSeed
from mode.paths import Paths

Folder = Annotated[str, Field(min_length=1)]


@flow(name="experiment", validate_parameters=True, persist_result=False)
def experiment(
    name: Name,
    quick: bool = False,
    seeds: list[RandomSeed] | None = None,
    jobs: Annotated[int, Field(ge=1, le=1024)] | None = None,
    data: dict[Name, Folder] | None = None,
    anew: bool = False,
) -> State[Any]:
    """Make the runs of experiments/NAME.yaml that are not done; cancelled, they go on from their checkpoints next time.

    The project is not held meanwhile: runs are of its last commit, in clones that share its cache.

    Args:
        name: Of the experiment, such as length.
        quick: See in minutes that everything works; its figures mean nothing.
        seeds: These random seeds alone, such as [0]; empty: those of the definition.
        jobs: Runs side by side; empty: one per core, or per GPU.
        data: Folders that the experiment needs, by name, on the worker's machine.
        anew: Also runs that were made elsewhere, whose figures are in experiments/results.
    """
    root = Path.cwd()
    if not Paths(root).experiment(name).is_file():
        raise ModeError(f"no experiment is called '{name}'", f"{Paths(root).experiments} has none of that name")
    mark_alive(root)
    run_step(f"experiment {name}", running(name, quick, seeds or [], jobs, data or {}, anew))
    return Completed(message=f"experiments/results/{name}.parquet" if not quick else "it works")


def running(
    name: str, quick: bool, seeds: Sequence[int], jobs: int | None, data: Mapping[str, str], anew: bool
) -> list[str]:
    """The module and arguments that make the runs. A folder is never taken for an option."""
    arguments = ["flows.runs", name]
    arguments += ["--quick"] if quick else []
    arguments += ["--anew"] if anew else []
    arguments += ["--seeds", *map(str, seeds)] if seeds else []
    arguments += ["--jobs", str(jobs)] if jobs else []
    return arguments + [f"--data={key}={folder}" for key, folder in data.items()]
