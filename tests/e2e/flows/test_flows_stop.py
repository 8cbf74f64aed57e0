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
    run: UUID = page.start("pipeline", machine={"workers": 2, "retries": 2})

    wait_until(lambda: all(project.events("start", expert) for expert in HELD), lambda: page.text(run))
    wait_until(lambda: page.state(run).is_running(), lambda: page.state(run))
    return run


def check_stopped(project: Any) -> None:
    """Both trainings wrote their checkpoints, nothing was started after them, and every slot is free."""
    for expert in HELD:
        assert [event["what"] for event in project.events(stage=expert)] == ["start", "checkpoint"]
    locks = [*Paths(project.root).cpu_locks.iterdir(), Paths(project.root).flow_lock]
    assert [path.name for path in locks if is_held(path)] == []


def check_goes_on(project: Any, page: Any, run: UUID) -> None:
    """A run completes, from the checkpoints."""
    assert page.await_end(run).type == "COMPLETED", f"{page.state(run)} {page.text(run)} {page.logs()}"
    for expert in HELD:
        first, second = project.events("start", expert)
        assert first["position"] == 0
        assert second["position"] == project.events("checkpoint", expert)[0]["position"] > 0


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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_killed_worker_stops_its_trainings_and_is_replaced(project: Any, page: Any, number: signal.Signals) -> None:
    run = begin(project, page)
    worker = page.worker()
    os.kill(worker, number)
    wait_until(lambda: len(project.events("checkpoint")) == 2 and not project.stages(), lambda: page.text(run))
    assert page.await_end(run).type in ("CRASHED", "CANCELLED")
    check_stopped(project)
    project.release()
    again = page.start("pipeline")
    check_goes_on(project, page, again)
    assert page.worker() != worker


@pytest.mark.parametrize("number", [signal.SIGINT], ids=["Ctrl-C"])
def test_ctrl_c_on_the_page_leaves_no_process(new_project: Any, open_page: Any, number: signal.Signals) -> None:
    page = open_page(new_project, "--no-mlflow")
    try:
        run = begin(new_project, page)
    finally:
        code = page.stop(number)
    assert code == 0
    left = os.popen(f"ps -eo pid,args | grep -F {new_project.root} | grep -v grep").read()
    assert left == ""
    assert new_project.stages() == []
    check_stopped(new_project)
    with sqlite3.connect(new_project.root / ".mode" / "prefect" / "prefect.db") as database:
        state = database.execute("SELECT state_type FROM flow_run WHERE id = ?", (str(run),)).fetchone()
    assert state == ("CANCELLED",)
