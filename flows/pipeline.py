"""Everything: data, seed, then dense models and experts side by side, then ensemble, evaluation and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State

from flows.parameters import Machine
from flows.stage import project_root, run_step
from flows.work import finish, run_part
from flows.workspace import mark_alive, workspace
from mode.errors import ModeError

#: What decides the order of experts: this file is written by `mode order TASK`.
ORDER = Path(".mode") / "order.json"


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
    root = project_root()
    if (order == "by_task") != bool(task):
        raise ModeError("order: by_task and task go together", "give both, or none of them")
    mark_alive(root)
    with workspace(root, machine.wait) as lock:
        held = (lock.descriptor,)
        if order == "listed":
            return finish(root, run_part(root, lambda stages: stages, machine, held))
        # The experts' conditions are enough to order them: no expert has to be there.
        before = run_part(root, lambda stages: stages.upto(["tasks", "ensemble"]), machine, held)
        if before.fatal:
            return finish(root, before)
        run_step(f"order by {task}", ["mode.cli", "order", task, "--output", str(ORDER)], held)
        experts = [f"expert@{name}" for name in json.loads((root / ORDER).read_text(encoding="utf-8"))]
        outcome = run_part(root, lambda stages: stages.first(experts), machine, held)
        return finish(root, outcome)


if __name__ == "__main__":
    pipeline()
