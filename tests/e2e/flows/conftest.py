"""A real DVC project with stages that take moments, and the real server, worker and pages on it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
import yaml
from prefect.client.schemas.filters import LogFilter
from prefect.client.schemas.objects import State
from prefect.client.schemas.sorting import LogSort
from prefect.states import AwaitingRetry, Cancelling

from benchmarks import orchestration
from mode.paths import Paths
from tests.e2e.conftest import give_database
from tests.waiting import wait_until

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
note("start", position=position, device=os.environ.get("MODE_DEVICE"), threads=os.environ.get("OMP_NUM_THREADS"))
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
        params = {"sources": {"base": {"shards": "glyphs"}}, "experts": experts, "model": {"name": "ViT-B-32"}}
        (self.root / "params.yaml").write_text(yaml.safe_dump(params))
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

    def processes(self) -> list[psutil.Process]:
        """Processes that work in this project's folder."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it ended meanwhile, or is not ours
                if Path(process.cwd()).is_relative_to(self.root):
                    found.append(process)
        return found

    def stages(self) -> list[str]:
        """Command lines of processes of stages or flows in this project."""
        words = ("stage.py", "dvc", "prefect.engine", "supervise")
        return [line for line in map(command_line, self.processes()) if any(word in line for word in words)]


class Page(orchestration.Page):
    """The page of a toy project."""

    def __init__(self, project: Any, *options: str) -> None:
        self.project = project
        super().__init__(project.root, terminal(), *options)

    def logs(self) -> str:
        """Ends of the services' logs."""
        files = sorted(Paths(self.root).logs.glob("*.log"))
        return "".join(f"\n--- {path.name}\n{path.read_text()[-3000:]}" for path in files)

    def start(self, deployment: str, **parameters: Any) -> UUID:
        """Start a run on the CPU that waits for nothing before it tries again."""
        machine = {"devices": "cpu", "retry_delay": 0, **parameters.pop("machine", {})}
        return super().start(deployment, machine=machine, **parameters)

    def await_end(self, run: UUID) -> State[Any]:
        """Wait for a run's final state, as long as stages begin and end."""
        wait_until(
            lambda: self.state(run).is_final(),
            lambda: f"{self.state(run)} {self.text(run)} {self.logs()}",
            lambda: sorted((name, task.state_name) for name, task in self.tasks(run).items()),
        )
        return self.state(run)

    def cancel(self, run: UUID) -> None:
        """Cancel a run, as the page and the command line do."""
        self.client.set_flow_run_state(run, Cancelling())

    def retry(self, run: UUID) -> None:
        """Retry a run that has ended, as the page's button does."""
        self.client.set_flow_run_state(run, AwaitingRetry(), force=True)

    def text(self, run: UUID) -> str:
        """All log lines of a run."""
        these = LogFilter.model_validate({"flow_run_id": {"any_": [run]}})
        lines = self.client.read_logs(these, limit=200, sort=LogSort.TIMESTAMP_ASC)
        return "\n".join(line.message for line in lines)

    def artifacts(self, run: UUID) -> dict[str, Any]:
        """What a run has left on its page, by key."""
        found = self.client.read_artifacts(flow_run_filter=orchestration.this_run(run))
        return {artifact.key or "": artifact.data for artifact in found}

    def worker(self) -> int:
        """Process id of the worker."""
        [found] = [each.pid for each in self.project.processes() if "prefect worker start" in command_line(each)]
        return found


def command_line(process: psutil.Process) -> str:
    """Of a process that may end meanwhile."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def terminal() -> dict[str, str]:
    """The environment of a terminal in the project: its own programs first, no settings of Prefect's, `/bin/sh`."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "MODE_", "OMP_", "SHELL"))
    }
    folder = str(Path(sys.executable).parent)
    path = f"{folder}{os.pathsep}{kept['PATH']}"
    # A machine that stands still for a moment must not get a training killed before its checkpoint.
    return kept | {"PATH": path, "DVC_NO_ANALYTICS": "true", "MODE_STOP_SECONDS": "60"}


def toy_project(root: Path, prefect_database: Path) -> ToyProject:
    """A project whose page need not make Prefect's database first."""
    project = ToyProject(root)
    project.create()
    give_database(Paths(root).prefect_home, prefect_database)
    return project


@pytest.fixture
def new_project(tmp_path: Path, prefect_database: Path) -> ToyProject:
    """A project of the test's own."""
    return toy_project(tmp_path / "project", prefect_database)


@pytest.fixture(scope="session")
def open_page() -> Callable[..., Page]:
    """`open_page(project, *options)` starts `python -m flows.ui`."""
    return Page


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> ToyProject:
    """The project of the shared page; a test begins with `project.fresh()`."""
    return toy_project(tmp_path_factory.mktemp("flows") / "project", prefect_database)


@pytest.fixture(scope="session")
def page(project: ToyProject) -> Iterator[Page]:
    """The page that most tests share: its start takes ten seconds."""
    page = Page(project, "--no-mlflow")
    yield page
    page.stop()
