"""Trainings as jobs of a real Slurm: the same models as on this machine, whatever happens to jobs and nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mode.files import sha256_of
from mode.slurm import commands
from mode.stages import run_stage
from tests.e2e.conftest import REPOSITORY, VIT, SmallProject, environment, give_database, make_project, run_here
from tests.e2e.slurm import NODES, Slurm, missing
from tests.waiting import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing()), reason=missing() or "Slurm is here")]

EXPERTS = ("expert-0", "expert-1")
WEIGHTS = "open_clip_model.safetensors"
#: The flow as a program of its own, with Prefect's temporary server.
FLOW = """
import json, sys
from flows.train_expert import train_expert
state = train_expert(json.loads(sys.argv[1]), machine=json.loads(sys.argv[2]), return_state=True)
print("flow ended as", state.name, state.message, flush=True)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    # munge refuses a socket in a folder that others might have made; pytest's own are of mode 700.
    made = Slurm(tmp_path_factory.mktemp("slurm") / "slurm")
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Iterator[SmallProject]:
    """A project with everything that experts need, and no expert yet."""
    made = make_project(tmp_path_factory.mktemp("jobs") / "project")
    params = made.params()
    params["glyphs"]["pairs"] = 600
    params["model"] = {"config": VIT, "tokenizer": "words", "vocabulary": 500}
    params["training"] |= {"epoch_samples": 160, "epochs": 16, "batch_size": 8, "held_out": 40}
    params["machine"] |= {"checkpoint_minutes": 0.01, "threads": 1, "slurm": {"poll_seconds": 0.3}}
    made.set_params(params)
    shutil.copytree(REPOSITORY / "flows", made.root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    run_here(made, "names", "data@base", "index@base", "embedder", "embed@base", "cluster@base", "assign@base", "seed")
    give_database(made.root.parent / "prefect", prefect_database)
    yield made
    shutil.rmtree(made.root, ignore_errors=True)


@pytest.fixture(scope="module")
def here(project: SmallProject) -> dict[str, str]:
    """SHA-256 of the experts' weights that their stages make on this machine."""
    copy = SmallProject(project.root.parent / "here")
    shutil.copytree(project.root, copy.root)
    for expert in EXPERTS:
        run_stage("expert", expert, copy.root, copy.root / "params.yaml")
    return {expert: sha256_of(copy.root / "models" / expert / WEIGHTS) for expert in EXPERTS}


@pytest.fixture
def start(project: SmallProject, slurm: Slurm) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start(program, *arguments)` runs a program that trains as jobs, in a process group of its own."""
    started: list[subprocess.Popen[str]] = []
    variables = {
        **environment(),
        **slurm.variables,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{slurm.variables['PATH']}",
        "PYTHONPATH": f"{project.root / 'src'}{os.pathsep}{project.root}",
        "PREFECT_HOME": str(project.root.parent / "prefect"),
        # A machine that stands still for a moment is no fault.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "1000",
        "MODE_STOP_SECONDS": "1000",
        "MODE_DEVICE": "cpu",
    }

    def start(*command: str, **more: str) -> subprocess.Popen[str]:
        with log_of(project).open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=project.root,
                env=variables | more,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
    for job in slurm.jobs():
        slurm.ask("scancel", job["id"])
    wait_until(lambda: not slurm.jobs(), slurm.logs)


@pytest.fixture
def run_flow(project: SmallProject, start: Callable[..., subprocess.Popen[str]]) -> Callable[..., Any]:
    """`run_flow(*experts)` starts the flow that trains these experts as jobs."""
    machine = {"devices": "cpu", "retries": 0, "scheduler": "slurm", "slurm": {"poll_seconds": 0.3, "minutes": 30}}
    return lambda *experts: start("-c", FLOW, json.dumps(experts), json.dumps(machine))


@pytest.fixture
def repro(project: SmallProject, start: Callable[..., subprocess.Popen[str]]) -> Callable[..., Any]:
    """`repro(expert)` trains an expert as a job, from nothing, by `dvc repro` in a terminal."""

    def begin(expert: str, **variables: str) -> subprocess.Popen[str]:
        forget(project)
        return start("-m", "dvc", "repro", "--single-item", f"expert@{expert}", **{"MODE_LAUNCH": "slurm", **variables})

    return begin


def forget(project: SmallProject) -> None:
    """Leave DVC nothing to take the experts from."""
    shutil.rmtree(project.root / ".dvc/cache/runs", ignore_errors=True)
    lock = project.root / "dvc.lock"
    content = yaml.safe_load(lock.read_text())
    content["stages"] = {name: stage for name, stage in content["stages"].items() if not name.startswith("expert@")}
    lock.write_text(yaml.safe_dump(content, sort_keys=False))


def log_of(project: SmallProject) -> Path:
    return project.root.parent / "log"


def said(project: SmallProject) -> str:
    return log_of(project).read_text(errors="replace")


def finish(project: SmallProject, slurm: Slurm, process: subprocess.Popen[str]) -> str:
    """Wait for the end of what trains, and that it is well; what it has said."""
    wait_until(lambda: process.poll() is not None, lambda: said(project) + slurm.logs(), lambda: said(project))
    assert process.returncode == 0, said(project) + slurm.logs()
    assert slurm.jobs() == []
    return said(project)


def weights(project: SmallProject, *experts: str) -> dict[str, str]:
    return {expert: sha256_of(project.root / "models" / expert / WEIGHTS) for expert in experts}


def has_checkpoint(project: SmallProject, expert: str) -> bool:
    return any((project.root / "checkpoints" / expert).glob("*/checkpoint.safetensors"))


def training(project: SmallProject, slurm: Slurm, process: subprocess.Popen[str], *experts: str) -> None:
    """Wait until jobs of these experts train, each past its first checkpoint."""

    def does() -> bool:
        assert process.poll() is None, said(project) + slurm.logs()
        return all(has_checkpoint(project, expert) for expert in experts)

    wait_until(does, lambda: said(project) + slurm.logs())


def test_a_flow_makes_the_models_of_this_machine_and_ctrl_c_leaves_no_job(
    project: SmallProject, slurm: Slurm, here: dict[str, str], run_flow: Callable[..., subprocess.Popen[str]]
) -> None:
    flow = run_flow(*EXPERTS)
    training(project, slurm, flow, *EXPERTS)
    assert len(slurm.jobs()) == 2
    os.killpg(flow.pid, signal.SIGINT)
    wait_until(lambda: flow.poll() is not None, lambda: said(project))
    assert flow.returncode != 0
    assert slurm.jobs() == [], said(project)
    assert all(has_checkpoint(project, expert) for expert in EXPERTS), said(project)

    text = finish(project, slurm, run_flow(*EXPERTS))
    assert "flow ended as Completed" in text, text
    for expert in EXPERTS:
        assert f"expert@{expert} runs on slurm" in text
        assert f"{expert} goes on from its checkpoint" in text
        assert (project.root / ".mode/jobs" / expert).stat().st_mode & 0o777 == 0o700
    assert weights(project, *EXPERTS) == here
    assert "up to date" in project.run("dvc", "status", *(f"expert@{expert}" for expert in EXPERTS)).stdout


def test_a_preempted_job_goes_on_from_its_checkpoint_while_the_controller_restarts(
    project: SmallProject, slurm: Slurm, here: dict[str, str], repro: Callable[..., subprocess.Popen[str]]
) -> None:
    process = repro("expert-0")
    training(project, slurm, process, "expert-0")
    [job] = slurm.jobs()
    slurm.ask("scontrol", "requeue", job["id"])
    slurm.stop_controller()
    wait_until(lambda: "Slurm does not answer" in said(project), lambda: said(project))
    slurm.start_controller()
    text = finish(project, slurm, process)
    assert text.count("expert-0: stopped after step") == 1
    assert re.search(r"is running on node[12], restart 1", text)
    assert "expert-0 goes on from its checkpoint" in text
    assert weights(project, "expert-0") == {"expert-0": here["expert-0"]}


def is_back(slurm: Slurm, node: str) -> bool:
    """Whether jobs run on a node again. Slurm may take it back by itself, or has to be told to."""
    if slurm.state(node) == "IDLE":
        return True
    slurm.ask("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)  # it may just have been taken back
    return False


def test_a_job_that_dies_with_its_node_goes_on_on_the_other(
    project: SmallProject, slurm: Slurm, here: dict[str, str], repro: Callable[..., subprocess.Popen[str]]
) -> None:
    process = repro("expert-1")
    training(project, slurm, process, "expert-1")
    [job] = slurm.jobs()
    slurm.kill_node(job["node"])
    slurm.ask("scontrol", "update", f"NodeName={job['node']}", "State=DOWN", "Reason=killed")
    try:
        text = finish(project, slurm, process)
    finally:
        slurm.start_node(job["node"])
        wait_until(lambda: is_back(slurm, job["node"]), slurm.logs)
    [other] = set(NODES) - {job["node"]}
    assert f"is running on {other}" in text
    assert "expert-1 goes on from its checkpoint" in text
    assert "stopped after step" not in text
    assert weights(project, "expert-1") == {"expert-1": here["expert-1"]}


@pytest.fixture
def endless(project: SmallProject) -> Iterator[str]:
    """An expert whose training does not end while a test lasts."""
    params = project.params()
    endless = {
        **params,
        "experts": {**params["experts"], "expert-0": {**params["experts"]["expert-0"], "epochs": 9999}},
    }
    project.set_params(endless)
    yield "expert-0"
    project.set_params(params)


def test_what_others_do_to_jobs_is_told(
    project: SmallProject, slurm: Slurm, endless: str, repro: Callable[..., subprocess.Popen[str]]
) -> None:
    process = repro(endless)
    training(project, slurm, process, endless)
    [left] = slurm.jobs()
    # The first: what it asks Slurm with looks like itself for a moment, after the fork.
    next(child for child in psutil.Process(process.pid).children(recursive=True) if "stage" in child.cmdline()).kill()
    wait_until(lambda: process.poll() is not None, lambda: said(project))
    assert [job["id"] for job in slurm.jobs()] == [left["id"]]

    process = repro(endless)
    wait_until(lambda: "expert-0 goes on from its checkpoint" in said(project), lambda: said(project) + slurm.logs())
    assert f"job {left['id']} is left of an earlier run: it is cancelled" in said(project)

    # Slurm tells the training, and gives it ten minutes; it needs none of them, and is submitted again.
    [job] = slurm.jobs()
    urgent = ("sbatch", "--parsable", "--partition=urgent", f"--nodelist={job['node']}", "--output=/dev/null")
    slurm.ask(*urgent, "--wrap=true")
    told = f"job {job['id']} was stopped (exit code 143); another one goes on"
    wait_until(lambda: told in said(project), lambda: said(project) + slurm.logs())
    resumed = "expert-0 goes on from its checkpoint"
    wait_until(lambda: said(project).count(resumed) == 2, lambda: said(project) + slurm.logs())

    [job] = [job for job in slurm.jobs() if job["name"].startswith("mode-")]
    slurm.ask("scancel", job["id"])
    wait_until(lambda: process.poll() is not None, lambda: said(project))
    assert process.returncode != 0
    assert said(project).count(f"error: expert-0: job {job['id']} was cancelled by somebody else") == 1
    assert "Traceback" not in said(project)


def test_two_nodes_train_one_model(
    project: SmallProject, slurm: Slurm, repro: Callable[..., subprocess.Popen[str]]
) -> None:
    text = finish(project, slurm, repro("expert-0", MODE_NODES="2"))
    assert re.search(r"is running on node\[1-2\]", text)
    card = json.loads((project.root / "models/expert-0/card.json").read_text())
    assert card["provenance"]["processes"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": "nowhere"}, "error: Slurm refuses the job: .*Invalid partition"),
        ({"minutes": 600}, "error: expert-0: job [0-9]+ can never start: PartitionTimeLimit"),
    ],
    ids=["partition", "limit"],
)
def test_a_job_that_slurm_refuses_is_one_line(
    project: SmallProject,
    slurm: Slurm,
    repro: Callable[..., subprocess.Popen[str]],
    settings: dict[str, Any],
    message: str,
) -> None:
    process = repro("expert-0", MODE_SLURM=json.dumps({"poll_seconds": 0.3, **settings}))
    wait_until(lambda: process.poll() is not None, lambda: said(project))
    assert process.returncode != 0
    assert len(re.findall(message, said(project))) == 1, said(project)
    assert "Traceback" not in said(project)
    wait_until(lambda: not slurm.jobs(), slurm.jobs)


#: In place of sbatch: a controller that goes away just then. `$STATE` is a folder of its own.
AWAY = """#!/bin/bash
exec 9> "$STATE/lock"
flock 9
calls=$(ls "$STATE" | grep -c call)
touch "$STATE/call-$calls"
if [ "$calls" -eq 0 ]; then
    [ "$MOMENT" = late ] || {real} $([ "$MOMENT" = ended ] && echo --wait) "$@" > /dev/null
    echo "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
[ "$MOMENT" = late ] && {real} "$@" > /dev/null
exec {real} "$@"
"""
WAIT = """
import sys
from pathlib import Path
from mode.params import MachineParams
from mode.slurm.waiting import run_as_job
machine = MachineParams(device="cpu", slurm={"poll_seconds": 0.2})
run_as_job("expert-0", ["sh", "-c", "echo $SLURM_JOB_ID >> ran"], machine, Path.cwd())
"""


@pytest.mark.parametrize(("moment", "calls"), [("queued", 1), ("ended", 1), ("late", 2)])
def test_a_submission_in_doubt_runs_once(slurm: Slurm, tmp_path: Path, moment: str, calls: int) -> None:
    """The controller had taken the job; it has even ended already; or it takes it beside the next attempt."""
    for name in ("bin", "state", "root"):
        (tmp_path / name).mkdir()
    real = shutil.which("sbatch", path=slurm.variables["PATH"])
    (tmp_path / "bin/sbatch").write_text(AWAY.replace("{real}", str(real)))
    (tmp_path / "bin/sbatch").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{slurm.variables['PATH']}"
    variables = {"PATH": path, "STATE": str(tmp_path / "state"), "MOMENT": moment}
    done = subprocess.run(
        [sys.executable, "-c", WAIT],
        cwd=tmp_path / "root",
        env=environment() | slurm.variables | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + slurm.logs()
    assert done.stderr.count("Slurm does not answer, and is asked again: Batch job submission failed") == 1
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "state").glob("call-*"))) == calls
    wait_until(lambda: not slurm.jobs(), slurm.logs)
    assert len((tmp_path / "root/ran").read_text().split()) == 1


def test_a_user_s_own_settings_of_slurm_s_commands_hide_no_job(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    likings = {"SQUEUE_STATES": "running", "SQUEUE_PARTITION": "urgent", "SCANCEL_INTERACTIVE": "true"}
    for name, value in (slurm.variables | likings).items():
        monkeypatch.setenv(name, value)
    name = "mode-expert-0-likings"
    waiting = slurm.ask("sbatch", "--parsable", "--hold", f"--job-name={name}", "--output=/dev/null", "--wrap=true")
    assert commands.jobs_called(name) == [int(waiting)]
    commands.cancel(int(waiting), name)
    assert commands.jobs_called(name) == []


def test_a_number_that_another_job_has_now_is_nobody_s(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that has lost its state counts from 1 again."""
    for name, value in slurm.variables.items():
        monkeypatch.setenv(name, value)
    number = int(slurm.ask("sbatch", "--parsable", "--hold", "--job-name=b", "--output=/dev/null", "--wrap=true"))
    assert commands.look_at(number, "a") is None
    commands.cancel(number, "a")
    assert commands.look_at(number, "b") == commands.Job("PENDING", "JobHeldUser", name="b")
    commands.cancel(number, "b")
    wait_until(lambda: not slurm.jobs(), slurm.logs)


def test_templates_train_experts_without_prefect(
    project: SmallProject, slurm: Slurm, here: dict[str, str], start: Callable[..., subprocess.Popen[str]]
) -> None:
    forget(project)
    shutil.copytree(REPOSITORY / "deploy", project.root / "deploy", dirs_exist_ok=True)
    script = "import os, sys; os.execvp('sbatch', ['sbatch', '--wait', *sys.argv[1:]])"
    process = start("-c", script, "--array=0-1", "deploy/slurm/experts.sbatch", *EXPERTS)
    training(project, slurm, process, "expert-1")
    # What Slurm sends before a time limit; the job then asks to be started again.
    [log] = project.root.glob("mode-expert-*-1.log")
    slurm.ask("scancel", "--signal=TERM", log.stem.removeprefix("mode-expert-").replace("-", "_"))
    finish(project, slurm, process)
    assert weights(project, *EXPERTS) == here
    assert log.read_text().count("expert-1 goes on from its checkpoint") == 1
    [other] = project.root.glob("mode-expert-*-0.log")
    assert "goes on from its checkpoint" not in other.read_text()

    finish(project, slurm, start("-c", script, "deploy/slurm/pipeline.sbatch", *(f"expert@{name}" for name in EXPERTS)))
    [log] = project.root.glob("mode-pipeline-*.log")
    assert all(f"Stage 'expert@{name}' didn't change, skipping" in log.read_text() for name in EXPERTS)
