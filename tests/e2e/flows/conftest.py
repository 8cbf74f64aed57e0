"""A real DVC project with stages that take moments, and the real server, worker and pages on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[3]

#: A stage that behaves as a training does: steps, checkpoints, SIGTERM, and faults on request.
STAGE = """
import ctypes, json, os, signal, sys, time
from pathlib import Path

ctypes.CDLL(None).prctl(1, signal.SIGTERM)
name, out = sys.argv[1], Path(sys.argv[2])
params = json.loads(Path("params.json").read_text())
plan = json.loads(Path("plan.json").read_text())
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
signal.signal(signal.SIGINT, lambda *_: told.append(1))


def note(what, **more):
    line = {"stage": name, "what": what, "time": time.time(), "pid": os.getpid(), **more}
    with Path("events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\\n")


fault = Path("faults") / name
if fault.is_file() and int(fault.read_text()) > 0:
    fault.write_text(str(int(fault.read_text()) - 1))
    note("fault")
    sys.exit(f"error: {name} has a fault")
checkpoint = Path("checkpoints") / f"{name}-{params['salt']}"
position = int(checkpoint.read_text()) if checkpoint.is_file() else 0
note("start", position=position, device=os.environ.get("MODE_DEVICE"), threads=os.environ.get("MODE_THREADS"))
print(f"{name} starts at step {position}", flush=True)
steps = plan["steps"].get(name, 2)
while position < steps or (name in plan["held"] and not Path("release").exists()):
    time.sleep(0.1)
    position += 1
    if position % 10 == 0:
        print(f"{name}: step {position}", flush=True)
    if told:
        time.sleep(0.5)
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.write_text(str(position))
        note("checkpoint", position=position)
        sys.exit(143)
if out.suffix:
    out.parent.mkdir(parents=True, exist_ok=True)
else:
    out.mkdir(parents=True, exist_ok=True)
if name == "evaluate":
    models = sorted(path.name for path in Path("models").iterdir())
    accuracy = {model: 0.5 if model != "ensemble" else 0.75 for model in models}
    out.write_text(json.dumps({"zeroshot": {"mean": accuracy, "tasks": {"glyphs": accuracy}}, "models": models}))
elif out.suffix:
    out.write_text(f"{name} {params['salt']}")
else:
    (out / "model.txt").write_text(f"{name} {params['salt']}")
note("end")
"""

DVC_YAML = """
stages:
  data: {cmd: python stage.py data data/pairs, params: [params.json: [salt]], outs: [data/pairs]}
  seed: {cmd: python stage.py seed models/seed, deps: [data/pairs], params: [params.json: [salt]], outs: [models/seed]}
  dense:
    cmd: python stage.py dense models/dense
    deps: [models/seed]
    params: [params.json: [salt]]
    outs: [models/dense]
  expert:
    foreach: ${experts}
    do:
      cmd: python stage.py ${key} models/${key}
      deps: [models/seed]
      params: [params.json: [salt]]
      outs: ["models/${key}"]
  ensemble:
    cmd: python stage.py ensemble models/ensemble
    deps: [data/pairs]
    params: [params.json: [salt]]
    outs: [models/ensemble]
  evaluate:
    cmd: python stage.py evaluate reports/metrics.json
    deps: [models]
    outs: [{reports/metrics.json: {cache: false}}]
  report:
    cmd: python stage.py report reports/page
    deps: [reports/metrics.json]
    params: [params.json: [salt]]
    outs: [reports/page]
"""


class ToyProject:
    """A DVC project whose stages do as `plan.json` and `faults/` say."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.salt = 0

    def create(self) -> None:
        """Lay out the project: git, DVC, the stage script, this repository's flows."""
        self.root.mkdir(parents=True)
        (self.root / "stage.py").write_text(STAGE)
        (self.root / "dvc.yaml").write_text(DVC_YAML)
        experts = {f"expert-{number}": {"source": "base", "cluster": number} for number in range(4)}
        (self.root / "params.yaml").write_text(yaml.safe_dump({"sources": {"base": {}}, "experts": experts}))
        (self.root / ".dvcignore").write_text("/.mode\n/flows\n/checkpoints\n")
        (self.root / ".gitignore").write_text("/data/\n/models/\n/reports/\n")
        shutil.copytree(REPOSITORY / "flows", self.root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / "prefect.yaml", self.root)
        self.fresh()
        subprocess.run(["git", "init", "-q"], cwd=self.root, check=True)
        self.dvc("init", "-q")
        self.dvc("config", "core.analytics", "false")

    def fresh(
        self, steps: dict[str, int] | None = None, faults: dict[str, int] | None = None, held: tuple[str, ...] = ()
    ) -> None:
        """Make every stage out of date.

        Args:
            steps: of a stage, each 0.1 s; default 2.
            faults: how often a stage fails.
            held: stages that go on until `release`.
        """
        self.salt += 1
        (self.root / "release").unlink(missing_ok=True)
        (self.root / "params.json").write_text(json.dumps({"salt": self.salt}))
        (self.root / "plan.json").write_text(json.dumps({"steps": steps or {}, "held": held}))
        shutil.rmtree(self.root / "faults", ignore_errors=True)
        (self.root / "faults").mkdir()
        for name, count in (faults or {}).items():
            (self.root / "faults" / name).write_text(str(count))
        (self.root / "events.jsonl").write_text("")

    def release(self) -> None:
        """Let held stages end."""
        (self.root / "release").touch()

    def dvc(self, *arguments: str) -> str:
        """Run DVC in the project, as in a terminal."""
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments], cwd=self.root, env=terminal(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def events(self, what: str | None = None, stage: str | None = None) -> list[dict[str, Any]]:
        """What the stages noted."""
        lines = [json.loads(line) for line in (self.root / "events.jsonl").read_text().splitlines()]
        return [line for line in lines if what in (None, line["what"]) and stage in (None, line["stage"])]

    def lock(self) -> dict[str, Any]:
        """Stages of dvc.lock."""
        content: dict[str, Any] = yaml.safe_load((self.root / "dvc.lock").read_text())
        return dict(content["stages"])

    def processes(self) -> list[str]:
        """Command lines of processes of stages or flows in this project."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                inside = (entry / "cwd").readlink().is_relative_to(self.root)
            except OSError:
                continue
            if inside and any(word in command for word in ("stage.py", "dvc", "prefect.engine", "supervise")):
                found.append(command)
        return found


class Page:
    """`python -m flows.ui` on a project, and Prefect's API."""

    def __init__(self, project: ToyProject, *options: str) -> None:
        self.project = project
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.ui", "--prefect-port", "0", "--mlflow-port", "0", *options],
            cwd=project.root,
            env=terminal(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if line.startswith("Ctrl-C"):
                break
        else:
            raise AssertionError(f"the page did not start: {''.join(self.output)}{self.logs()}")
        self.address = next(line.split()[1] for line in self.output if line.startswith("Prefect"))
        self.mlflow = next(line.split()[1] for line in self.output if line.startswith("MLflow"))

    def logs(self) -> str:
        """Ends of the services' logs."""
        files = sorted((self.project.root / ".mode" / "logs").glob("*.log"))
        return "".join(f"\n--- {path.name}\n{path.read_text()[-3000:]}" for path in files)

    def call(self, path: str, body: object | None = None) -> Any:
        """GET, or POST a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/api/{path}", data, {"content-type": "application/json"})
        for _ in range(10):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code != 503:  # the server's database is locked: Prefect's own client tries again, too
                    raise
                time.sleep(1)
        raise AssertionError("the server's database stays locked")

    def start(self, flow: str, **parameters: Any) -> str:
        """Start a run of a deployment, as the page does; its id."""
        deployment = self.call(f"deployments/name/{flow}/{flow}")["id"]
        machine = {"devices": "cpu", "retry_delay": 0, **parameters.pop("machine", {})}
        body = {"parameters": {"machine": machine, **parameters}, "state": {"type": "SCHEDULED"}}
        return str(self.call(f"deployments/{deployment}/create_flow_run", body)["id"])

    def state(self, run: str) -> dict[str, Any]:
        """A run's state: type, name, message."""
        return dict(self.call(f"flow_runs/{run}")["state"])

    def await_end(self, run: str, seconds: float = 240) -> dict[str, Any]:
        """Wait for a run's final state."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
        await_that(lambda: self.state(run)["type"] in ends, seconds, lambda: f"{self.state(run)} {self.text(run)}")
        return self.state(run)

    def cancel(self, run: str) -> None:
        """Cancel a run, as the page and the command line do."""
        self.call(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})

    def retry(self, run: str) -> None:
        """Retry a run that has ended, as the page's button does."""
        self.call(
            f"flow_runs/{run}/set_state", {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
        )

    def tasks(self, run: str) -> dict[str, dict[str, Any]]:
        """Task runs by name, but for those that the server lists a moment before they have a state."""
        found = self.call("task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return {task["name"]: task for task in found if task["state"]}

    def text(self, run: str) -> str:
        """All log lines of a run."""
        body = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200, "sort": "TIMESTAMP_ASC"}
        return "\n".join(line["message"] for line in self.call("logs/filter", body))

    def worker(self) -> int:
        """Process id of the worker."""
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                inside = (entry / "cwd").readlink() == self.project.root
            except OSError:
                continue
            if inside and "prefect worker start" in command:
                return int(entry.name)
        raise AssertionError("no worker")

    def stop(self, number: int = signal.SIGINT) -> int:
        """Ctrl-C, and wait for the end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=180)
        self.output.append(output)
        return self.process.returncode


def terminal() -> dict[str, str]:
    """The environment of a terminal in the project: its own programs first, no settings of Prefect's, `/bin/sh`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "MODE_", "SHELL"))}
    folder = str(Path(sys.executable).parent)
    path = f"{folder}{os.pathsep}{kept['PATH']}"
    # A machine that stands still for a moment must not get a training killed before its checkpoint.
    return kept | {"PATH": path, "DVC_NO_ANALYTICS": "true", "MODE_STOP_SECONDS": "60"}


def await_that(condition: Callable[[], object], seconds: float = 180, describe: Callable[[], str] = lambda: "") -> None:
    """Wait until a condition holds; fail with a description if it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {seconds} s: {textwrap.shorten(describe(), 4000)}")
        time.sleep(0.1)


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """`wait_until(condition, seconds, describe)`."""
    return await_that


@pytest.fixture
def new_project(tmp_path: Path) -> ToyProject:
    """A project of the test's own."""
    project = ToyProject(tmp_path / "project")
    project.create()
    return project


@pytest.fixture(scope="session")
def open_page() -> Callable[..., Page]:
    """`open_page(project, *options)` starts `python -m flows.ui`."""
    return Page


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> ToyProject:
    """The project of the shared page; a test begins with `project.fresh()`."""
    project = ToyProject(tmp_path_factory.mktemp("flows") / "project")
    project.create()
    return project


@pytest.fixture(scope="session")
def page(project: ToyProject) -> Iterator[Page]:
    """The page that most tests share: its start takes ten seconds."""
    page = Page(project, "--no-mlflow")
    yield page
    page.stop()
