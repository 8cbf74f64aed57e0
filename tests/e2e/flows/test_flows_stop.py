"""Cancel, kill, Ctrl-C: checkpoints are written, slots are free, no process is left, and the next run goes on."""

from __future__ import annotations

import os
import signal
import sqlite3
from typing import Any
from uuid import UUID

import pytest

from flows.locks import is_held
from mode.paths import Paths
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e

#: They train until they are stopped; two more would come after them.
HELD = ("expert-0", "expert-1")


def begin(project: Any, page: Any) -> UUID:
    """A run of the pipeline that is training two experts."""
    project.fresh(steps={"dense": 0}, held=HELD)
    return train(project, page)


def train(project: Any, page: Any, before: int = 0) -> UUID:
    """Start a run of the pipeline, and wait until both experts have been started once more than `before`."""
    run: UUID = page.start("pipeline", machine={"workers": 2, "retries": 2})
    wait_until(
        lambda: all(len(project.events("start", expert)) > before for expert in HELD),
        lambda: page.text(run),
    )
    wait_until(lambda: page.state(run).is_running(), lambda: page.state(run))
    return run


def check_stopped(project: Any, times: int = 1) -> None:
    """Both trainings wrote their checkpoints, each time, nothing was started after them, and every slot is free."""
    for expert in HELD:
        assert [event["what"] for event in project.events(stage=expert)] == ["start", "checkpoint"] * times
    locks = [*Paths(project.root).cpu_locks.iterdir(), Paths(project.root).flow_lock]
    assert [path.name for path in locks if is_held(path)] == []


def check_goes_on(project: Any, page: Any, run: UUID) -> None:
    """A run completes, from the checkpoints."""
    assert page.await_end(run).type == "COMPLETED", f"{page.state(run)} {page.text(run)} {page.logs()}"
    for expert in HELD:
        positions = [event["position"] for event in project.events("start", expert)]
        assert positions == [0, *(event["position"] for event in project.events("checkpoint", expert))]
        assert positions == sorted({*positions})  # each further than the one before


def test_cancel_stops_with_a_checkpoint_and_a_retry_goes_on(project: Any, page: Any) -> None:
    run = begin(project, page)
    page.cancel(run)
    wait_until(lambda: len(project.events("checkpoint")) == 2 and not project.stages(), lambda: page.text(run))
    assert page.await_end(run).type == "CANCELLED"
    check_stopped(project)
    project.release()
    page.retry(run)
    wait_until(lambda: page.state(run).type not in ("SCHEDULED", "CANCELLED"))
    check_goes_on(project, page, run)


def test_killed_workers_stop_their_trainings_and_are_replaced(project: Any, page: Any) -> None:
    """Killed, then told to end: the second run goes on where the first was stopped, the third where the second was."""
    run = begin(project, page)
    for times, number in enumerate((signal.SIGKILL, signal.SIGTERM), start=1):
        worker = page.worker()
        os.kill(worker, number)
        wait_until(
            lambda: len(project.events("checkpoint")) == 2 * times and not project.stages(),  # noqa: B023
            lambda: page.text(run),  # noqa: B023
        )
        assert page.await_end(run).type in ("CRASHED", "CANCELLED")
        check_stopped(project, times)
        run = train(project, page, before=times)
        assert page.worker() != worker
    project.release()
    check_goes_on(project, page, run)


@pytest.mark.parametrize("number", [signal.SIGINT], ids=["Ctrl-C"])
def test_ctrl_c_on_the_page_leaves_no_process(new_project: Any, open_page: Any, number: signal.Signals) -> None:
    page = open_page(new_project, "--no-mlflow")
    try:
        run = begin(new_project, page)
        late = page.start("evaluate")  # its process has just been started
        wait_until(lambda: not page.state(late).is_scheduled(), lambda: page.state(late))
    finally:
        code = page.stop(number)
    assert code == 0
    left = os.popen(f"ps -eo pid,args | grep -F {new_project.root} | grep -v grep").read()
    assert left == ""
    assert new_project.stages() == []
    check_stopped(new_project)
    with sqlite3.connect(new_project.root / ".mode" / "prefect" / "prefect.db") as database:
        states = dict(database.execute("SELECT id, state_type FROM flow_run").fetchall())
    assert states == {str(run): "CANCELLED", str(late): "CANCELLED"}
