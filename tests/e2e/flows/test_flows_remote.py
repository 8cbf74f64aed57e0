"""An expert trained by a worker in another checkout, exchanged through a DVC remote."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.client.schemas.actions import WorkPoolCreate

from tests.waiting import wait_until

pytestmark = pytest.mark.e2e


def elsewhere(project: Any, root: Path) -> Any:
    """A checkout on another machine: what git has, and no result."""
    copy = type(project)(root)
    skipped = shutil.ignore_patterns(".mode", "cache", "tmp", "models", "data", "reports", "dvc.lock", "checkpoints")
    shutil.copytree(project.root, copy.root, ignore=skipped)
    return copy


def prefect(project: Any, page: Any, *arguments: str) -> subprocess.Popen[str]:
    """Prefect's command line in a checkout, speaking to the page's server."""
    from tests.e2e.flows.conftest import terminal

    settings = {
        "PREFECT_API_URL": f"{page.prefect}/api",
        "PREFECT_API_AUTH_STRING": page.secret,
        "PREFECT_HOME": str(project.root / ".mode" / "prefect"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        cwd=project.root,
        env=terminal() | settings | {"PYTHONPATH": os.pathsep.join([str(project.root), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_worker_elsewhere_trains_an_expert_that_the_ensemble_takes_in(
    project: Any, page: Any, tmp_path: Path
) -> None:
    project.fresh()
    shutil.rmtree(project.root / "models", ignore_errors=True)  # of other tests on the shared project
    project.dvc("remote", "add", "--force", "--default", "store", str(tmp_path / "store"))
    other = elsewhere(project, tmp_path / "other")
    project.dvc("repro", "-q", "seed")
    project.dvc("push", "-q", "--run-cache")

    deploy = prefect(
        *(other, page, "deploy", "flows/train_expert.py:train_expert"),
        *("--name", "train-expert-cluster", "--pool", "cluster"),
    )
    page.client.create_work_pool(WorkPoolCreate(name="cluster", type="process"))
    printed, _ = deploy.communicate()
    assert deploy.returncode == 0, printed
    worker = prefect(other, page, "worker", "start", "--pool", "cluster", "--type", "process", "--limit", "1")
    try:
        run = page.start("train-expert/train-expert-cluster", remote=True, experts=["expert-1"])
        assert page.await_end(run).type == "COMPLETED", page.text(run)
    finally:
        worker.send_signal(signal.SIGINT)
        worker.communicate()
    # Its inputs came from the remote; it trained that expert only.
    assert [event["stage"] for event in other.events("start")] == ["expert-1"]
    assert (other.root / "models/seed/model.txt").read_bytes() == (project.root / "models/seed/model.txt").read_bytes()

    run = page.start("evaluate", remote=True)
    state = page.await_end(run)
    assert state.name == "Incomplete", page.text(run)
    assert "without expert-0, expert-2, expert-3" in state.message
    wait_until(lambda: "expert@expert-0: nobody has made it yet" in page.text(run), lambda: page.text(run))
    assert [event["stage"] for event in project.events("start")] == ["data", "seed", "ensemble", "evaluate", "report"]
    models = json.loads((project.root / "reports" / "metrics.json").read_text())["models"]
    assert models == ["ensemble", "expert-1", "seed"]
    assert "expert@expert-1" in project.lock()


def test_without_a_remote_the_flow_says_so(project: Any, page: Any) -> None:
    project.fresh()
    (project.root / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    run = page.start("train-expert", experts=["expert-1"], remote=True)
    state = page.await_end(run)
    assert state.type == "FAILED"
    assert "there is no DVC remote (`dvc remote add --default NAME ADDRESS`)" in state.message
    assert project.events() == []
