"""Everything: data, seed, then dense models and experts side by side, then ensemble, evaluation and report."""

from __future__ import annotations

import json
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State

from flows import graph
from flows.devices import Machine
from flows.work import work
from mode import roles
from mode.errors import ModeError
from mode.paths import Paths


@flow(name="pipeline", validate_parameters=True, persist_result=False)
def pipeline(
    order: Literal["listed", "by_task"] = "listed",
    task: str = "",
    machine: Machine = Machine(),  # noqa: B008
) -> State[Any]:
    """Run every stage of dvc.yaml that is not up to date, in DVC's order; models side by side.

    Leaves what `dvc repro` leaves.

    An expert that fails for good does not stop the others: the ensemble is evaluated with the seed in its place, and
    the run ends as Incomplete. Cancelling writes checkpoints; the next run goes on from them.

    Args:
        order: listed: experts in the order of params.yaml. by_task: those first that matter most for `task`, by the
            routing weights of its words; dense models come last.
        task: For by_task: one of the project's tasks, or a task folder on the worker's machine.
        machine: Where trainings run, and how they are tried again.
    """
    if (order == "by_task") != bool(task):
        raise ModeError("order: by_task and task go together", "give both, or none of them")
    with work(machine) as here:
        if order == "listed":
            return here.finish(here.run(lambda pipeline: pipeline))
        # The experts' conditions are enough to order them: no expert has to be there.
        before = here.run(lambda pipeline: graph.upto(pipeline, ["tasks", roles.ENSEMBLE.name]))
        if before.fatal:
            return here.finish(before)
        path = Paths(here.root).order
        here.step(f"order by {task}", "mode.cli", "order", "--output", str(path), "--", task)
        names = json.loads(path.read_text(encoding="utf-8"))
        return here.finish(
            here.run(lambda pipeline: graph.first(pipeline, [graph.stage_of(pipeline, name) for name in names]))
        )


if __name__ == "__main__":
    pipeline()
