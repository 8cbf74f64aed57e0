"""Everything: data, seed, then dense models and experts side by side, then ensemble, evaluation and report."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.parameters import Machine
from flows.stage import project_root
from flows.work import finish, run_part
from flows.workspace import mark_alive, workspace


@flow(name="pipeline", validate_parameters=True, persist_result=False)
def pipeline(machine: Machine = Machine()) -> State[Any]:  # noqa: B008
    """Run every stage of dvc.yaml that is not up to date, in DVC's order; models side by side.

    Leaves what `dvc repro` leaves.

    An expert that fails for good does not stop the others: the ensemble is evaluated with the seed in its place, and
    the run ends as Incomplete. Cancelling writes checkpoints; the next run goes on from them.

    Args:
        machine: Where trainings run, and how they are tried again.
    """
    root = project_root()
    mark_alive(root)
    with workspace(root, machine.wait) as lock:
        outcome = run_part(root, lambda stages: stages, machine, (lock.descriptor,))
        return finish(root, outcome)


if __name__ == "__main__":
    pipeline()
