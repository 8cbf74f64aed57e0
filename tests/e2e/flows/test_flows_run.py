"""Runs of the flows on a real server, worker and DVC project."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from httpx import HTTPStatusError

from flows.stage import unkept
from mode.parallel import cores
from tests.e2e.conftest import give_database, small_disk
from tests.e2e.flows.conftest import terminal
from tests.waiting import LONG, wait_until

pytestmark = pytest.mark.e2e

EXPERTS = [f"expert-{number}" for number in range(4)]


def most_side_by_side(events: list[dict[str, Any]], stages: list[str]) -> int:
    """Most of these stages that were under way at one moment."""
    running = most = 0
    for event in sorted(events, key=lambda event: event["time"]):
        if event["stage"] in stages:
            running += {"start": 1, "end": -1}.get(event["what"], 0)
            most = max(most, running)
    return most


def test_flow_leaves_what_dvc_repro_leaves_and_runs_nothing_twice(project: Any, page: Any, tmp_path: Path) -> None:
    trainings = ["dense", *EXPERTS]
    project.fresh(steps=dict.fromkeys(EXPERTS, 30), held=(*trainings,))
    run = page.start("pipeline", machine={"workers": 2})
    # Held, so that on a busy machine, too, the first has not ended when the second begins.
    wait_until(
        lambda: sum(event["stage"] in trainings for event in project.events("start")) == 2, lambda: page.text(run)
    )
    project.release()
    assert page.await_end(run).type == "COMPLETED", page.text(run)
    by_flow = project.lock()
    events = project.events()
    assert most_side_by_side(events, trainings) == 2
    how = {event["stage"]: (event["device"], event["threads"]) for event in events if event["what"] == "start"}
    assert how["seed"] == ("cpu", str(cores()))
    assert {how[expert] for expert in EXPERTS} == {("cpu", str(max(1, cores() // 2)))}
    assert how["data"] == how["report"] == (None, None)
    wait_until(lambda: set(page.tasks(run)) == set(by_flow))
    wait_until(lambda: "expert-2: step 30" in page.text(run), lambda: page.text(run))  # the stage's own output

    # The same by DVC alone, in a copy that has no results and no cache.
    copy = type(project)(tmp_path / "copy")
    skipped = shutil.ignore_patterns(".mode", "cache", "tmp", "models", "data", "reports", "dvc.lock", "checkpoints")
    shutil.copytree(project.root, copy.root, ignore=skipped)
    copy.dvc("repro", "-q")
    assert copy.lock() == by_flow
    assert project.dvc("status").strip() == "Data and pipelines are up to date."

    again = page.start("pipeline")
    assert page.await_end(again).type == "COMPLETED"

    def states() -> dict[str, str]:
        return {name: task.state.name for name, task in page.tasks(again).items()}

    # Prefect's server notes the states of tasks a moment after they were sent.
    wait_until(lambda: states() == dict.fromkeys(by_flow, "Cached"), states)
    assert len(project.events()) == len(events)
    artifacts = page.artifacts(again)
    assert "| ensemble | **75.0** |" in artifacts["comparison"]


def test_expert_that_keeps_failing_is_left_out_and_the_run_says_so(project: Any, page: Any) -> None:
    project.fresh(faults={"expert-1": 3, "expert-2": 1})
    run = page.start("pipeline", machine={"workers": 2, "retries": 2})
    state = page.await_end(run)
    assert (state.type, state.name) == ("COMPLETED", "Incomplete"), page.text(run)
    assert "without expert-1: the seed stands in for it" in state.message
    assert "expert-1 has a fault" in state.message
    assert len(project.events("fault", "expert-1")) == 3
    assert len(project.events("fault", "expert-2")) == 1
    assert json.loads((project.root / "reports" / "metrics.json").read_text())["models"] == [
        *("dense", "ensemble", "expert-0", "expert-2", "expert-3", "seed")
    ]
    # Its faults are mended: only it and what comes after it runs.
    before = len(project.events("start"))
    run = page.start("pipeline")
    state = page.await_end(run)
    assert (state.type, state.name) == ("COMPLETED", "Completed"), page.text(run)
    assert [event["stage"] for event in project.events("start")[before:]] == ["expert-1", "evaluate", "report"]


def by_another_server(project: Any, home: Path) -> subprocess.CompletedProcess[str]:
    """A flow that waits for nobody, and knows nothing of the page's server: Prefect starts one for it."""
    code = (
        "import sys; from flows.evaluate import evaluate; from flows.devices import Machine\n"
        "state = evaluate(machine=Machine(devices='cpu', wait=False), return_state=True)\n"
        "sys.exit(f'{state.type.value}: {state.message}')"
    )
    own = {"PREFECT_HOME": str(home), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "1000"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=project.root,
        env=terminal() | own | {"PYTHONPATH": str(project.root)},
        capture_output=True,
        text=True,
        timeout=LONG,
    )


def test_two_flows_on_one_project(project: Any, page: Any, tmp_path: Path, prefect_database: Path) -> None:
    give_database(tmp_path / "prefect", prefect_database)
    project.fresh(held=("expert-0",))
    first = page.start("train-expert", experts=["expert-0"])
    wait_until(lambda: project.events("start", "expert-0"), lambda: page.text(first))
    impatient = page.start("train-expert", experts=["expert-1"], machine={"wait": False})
    state = page.await_end(impatient)
    assert state.type == "FAILED"
    assert "this project is held by train-expert run" in state.message
    elsewhere = by_another_server(project, tmp_path / "prefect")
    assert elsewhere.returncode == 1, elsewhere.stderr
    [ended] = [line for line in elsewhere.stderr.splitlines() if line.startswith("FAILED: ")]
    assert "this project is held by train-expert run" in ended
    patient = page.start("evaluate")
    wait_until(lambda: "waiting: this project" in page.text(patient), lambda: page.text(patient))
    project.release()
    assert page.await_end(first).type == "COMPLETED"
    assert page.await_end(patient).type == "COMPLETED", page.text(patient)
    assert project.events("start", "evaluate")[0]["time"] > project.events("end", "expert-0")[0]["time"]


def test_wrong_input_is_refused_before_anything_starts(project: Any, page: Any) -> None:
    project.fresh()
    for flow, wrong in [
        ("pipeline", {"machine": {"workers": 0}}),
        ("pipeline", {"machine": {"devices": "gpu"}}),
        ("train-expert", {"experts": []}),
        ("train-expert", {}),
        ("add-expert", {"name": "No spaces", "shards": "x"}),
    ]:
        with pytest.raises(HTTPStatusError) as refused:
            page.start(flow, **wrong)
        assert refused.value.response.status_code == 409
    run = page.start("train-expert", experts=["expert-9"])
    state = page.await_end(run)
    assert state.type == "FAILED"
    assert "no expert is called 'expert-9' (params.yaml has: expert-0, expert-1, expert-2, expert-3)" in state.message
    assert project.events() == []


def test_what_the_cache_has_no_room_for_is_not_made_again(project: Any, page: Any, tmp_path: Path) -> None:
    """DVC ends well there, and its next run would make the output anew, a training of days included."""
    project.fresh()
    with small_disk(tmp_path / "disk", megabytes=1):
        project.dvc("config", "--local", "cache.dir", str(tmp_path / "disk/cache"))
        try:
            ballast = tmp_path / "disk/ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            run = page.start("pipeline")
            state = page.await_end(run)
            assert state.type == "FAILED", page.text(run)
            assert "data is done, but DVC's cache has not taken it: [Errno 28] No space left" in state.message
            assert page.tasks(run)["data"].state_name == "Not kept"
            assert len(project.events("start", "data")) == 1
            assert project.events("start", "seed") == []

            ballast.unlink()
            project.dvc("commit", "--force", "data")
            again = page.start("pipeline")
            assert page.await_end(again).type == "COMPLETED", page.text(again)
            assert len(project.events("start", "data")) == 1
        finally:
            project.dvc("config", "--local", "--unset", "cache.dir")


def test_dvc_ends_well_where_its_cache_has_room_for_a_part(tmp_path: Path) -> None:
    made = "mkdir -p model && head -c 3000000 /dev/zero > model/weights"
    (tmp_path / "dvc.yaml").write_text(f"stages: {{model: {{cmd: {made}, outs: [model]}}}}")
    with small_disk(tmp_path / "disk", megabytes=1):
        for command in (["init", "-q", "--no-scm"], ["cache", "dir", str(tmp_path / "disk")], ["repro"]):
            done = subprocess.run([sys.executable, "-m", "dvc", *command], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0
    assert "No space left on device" in unkept(done.stderr.splitlines())
    assert unkept(["ERROR: failed to reproduce 'model': failed to run: train, exited with 1", "done"]) == ""
