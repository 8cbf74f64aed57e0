"""Cancel, kill, Ctrl-C: checkpoints are written, slots are free, no process is left, and the next run goes on."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import pytest

from flows.locks import is_held

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

#: They train until they are stopped; two more would come after them.
HELD = ("expert-0", "expert-1")


def begin(project: Any, page: Any, wait_until: Callable[..., None]) -> str:
    """A run of the pipeline that is training two experts."""
    project.fresh(steps={"dense": 0}, held=HELD)
    run = str(page.start("pipeline", machine={"workers": 2, "retries": 2}))

    def training() -> bool:
        return all(project.events("start", expert) for expert in HELD)

    wait_until(training, 240, lambda: page.text(run))
    time.sleep(0.5)
    return run


def check_stopped(project: Any) -> None:
    """Both trainings wrote their checkpoints, nothing was started after them, and every slot is free."""
    for expert in HELD:
        assert [event["what"] for event in project.events(stage=expert)] == ["start", "checkpoint"]
    locks = [*(project.root / ".mode" / "locks").iterdir(), project.root / ".mode" / "flow.lock"]
    assert [path.name for path in locks if is_held(path)] == []


def check_goes_on(project: Any, page: Any, run: str) -> None:
    """A run completes, from the checkpoints."""
    assert page.await_end(run)["type"] == "COMPLETED", f"{page.state(run)} {page.text(run)} {page.logs()}"
    for expert in HELD:
        first, second = project.events("start", expert)
        assert first["position"] == 0
        assert second["position"] == project.events("checkpoint", expert)[0]["position"] > 0


def test_cancel_stops_with_a_checkpoint_and_a_retry_goes_on(
    project: Any, page: Any, wait_until: Callable[..., None]
) -> None:
    run = begin(project, page, wait_until)
    page.cancel(run)
    wait_until(lambda: len(project.events("checkpoint")) == 2 and not project.processes(), 180, lambda: page.text(run))
    assert page.await_end(run)["type"] == "CANCELLED"
    check_stopped(project)
    project.release()
    page.retry(run)
    wait_until(lambda: page.state(run)["type"] not in ("SCHEDULED", "CANCELLED"), 180)
    check_goes_on(project, page, run)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_killed_worker_stops_its_trainings_and_is_replaced(
    project: Any, page: Any, wait_until: Callable[..., None], number: signal.Signals
) -> None:
    run = begin(project, page, wait_until)
    worker = page.worker()
    os.kill(worker, number)
    wait_until(lambda: len(project.events("checkpoint")) == 2 and not project.processes(), 180, lambda: page.text(run))
    assert page.await_end(run)["type"] in ("CRASHED", "CANCELLED")
    check_stopped(project)
    project.release()
    again = page.start("pipeline")
    check_goes_on(project, page, again)
    assert page.worker() != worker


@pytest.mark.parametrize("number", [signal.SIGINT], ids=["Ctrl-C"])
def test_ctrl_c_on_the_page_leaves_no_process(
    new_project: Any, open_page: Any, wait_until: Callable[..., None], number: signal.Signals
) -> None:
    page = open_page(new_project, "--no-mlflow")
    try:
        run = begin(new_project, page, wait_until)
    finally:
        code = page.stop(number)
    assert code == 0
    left = os.popen(f"ps -eo pid,args | grep -F {new_project.root} | grep -v grep").read()
    assert left == ""
    assert new_project.processes() == []
    check_stopped(new_project)
    with sqlite3.connect(new_project.root / ".mode" / "prefect" / "prefect.db") as database:
        state = database.execute("SELECT state_type FROM flow_run WHERE id = ?", (run,)).fetchone()
    assert state == ("CANCELLED",)
