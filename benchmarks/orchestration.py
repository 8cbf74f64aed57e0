"""What Prefect, DVC and MLflow add to the demo's work, and what they save.

    python -m benchmarks.orchestration [--folder FOLDER] [--output FILE]

Runs the demo in fresh clones, on a machine that should do nothing else, and prints a table:

- plain: every stage as `mode stage NAME`, one after another, with no DVC and MLflow left out;
- dvc: `dvc repro`;
- flow: the `pipeline` flow of a running page with 1 and with 2 workers; then once more with nothing to do;
- experts: four experts by themselves, in finished projects: `dvc repro` of them one after another, and the
  `train-expert` flow with 2 workers. A learning rate of their own makes them out of date.

dvc.lock is compared between `dvc repro` and the flows. It holds hashes of models, whose cards hold seconds: files
that differ only in what was measured count as equal, and everything else has to be equal byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import yaml

if TYPE_CHECKING:
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.objects import State, TaskRun

REPOSITORY = Path(__file__).parent.parent
#: What a file may say that is measured, not computed.
MEASURED = re.compile(r'"(seconds|threads|mlflow_run|commit|uncommitted_changes)"')

RUNS = ["plain", "dvc", "flow-1", "flow-2", "experts"]

#: `mode stage` with a tracker that does nothing.
UNTRACKED = """
import contextlib, sys
from pathlib import Path
from unittest.mock import MagicMock
from mode import stages
from mode.tracking import runs
from mode.processes import use_huge_pages

class Run(contextlib.nullcontext):
    header, run_id = MagicMock(run_id=None), None
    def log(self, *_): pass

class Tracker:
    def __init__(self, *_): pass
    def run(self, *_, **__): return Run()
    def log_results(self, *_, **__): return {}
    def register_ensemble(self, *_, **__): pass

runs.Tracker = Tracker
use_huge_pages()
stages.run_stage(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None, Path.cwd(), Path("params.yaml"))
"""


def clone(folder: Path) -> Path:
    """A fresh clone of what is committed here; it uses this environment's tools and its own sources."""
    subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(folder)], check=True)
    return folder


def environment(root: Path) -> dict[str, str]:
    """Settings of commands in a clone."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "MODE_", "OMP_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "DVC_NO_ANALYTICS": "true"}


def stages_in_order(root: Path) -> list[str]:
    """Stages of dvc.yaml by address, in an order in which they can run."""
    code = "from flows.graph import in_order, read; from pathlib import Path; print(*in_order(read(Path.cwd())[0]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment(root), capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def run_plain(root: Path) -> dict[str, float]:
    """Seconds in all, and of the experts."""
    spent = {"all": 0.0, "experts": 0.0}
    for stage in stages_in_order(root):
        started = time.monotonic()
        command = [sys.executable, "-c", UNTRACKED, *stage.split("@")]
        subprocess.run(command, cwd=root, env=environment(root), check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        spent["all"] += seconds
        spent["experts"] += seconds if stage.startswith("expert@") else 0.0
    return spent


def run_dvc(root: Path) -> dict[str, float]:
    """The same of `dvc repro`, from the lines that it prints."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"], cwd=root, env=environment(root), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    begun: list[tuple[str, float]] = []
    for line in process.stdout:
        if found := re.match(r"Running stage '(.*)'", line):
            begun.append((found[1], time.monotonic()))
    if process.wait():
        raise SystemExit("dvc repro failed")
    ended = time.monotonic()
    times = [*(moment for _, moment in begun), ended]
    experts = sum(times[n + 1] - times[n] for n, (stage, _) in enumerate(begun) if stage.startswith("expert@"))
    return {"all": ended - started, "experts": experts}


class Page:
    """`make ui` on a project, and Prefect's own client for its server.

    Args:
        root: of the project.
        settings: the environment; default that of commands in a clone.
        options: of `python -m flows.ui`.

    Raises:
        RuntimeError: it did not start; says what it printed.
    """

    def __init__(self, root: Path, settings: dict[str, str] | None = None, *options: str) -> None:
        from prefect.client.orchestration import SyncPrefectClient

        self.root = root
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.ui", "--prefect-port", "0", "--mlflow-port", "0", *options],
            cwd=root,
            env=settings or environment(root),
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
            raise RuntimeError(f"the page did not start: {''.join(self.output)}")
        self.prefect, self.mlflow = (self.address(name) for name in ("Prefect", "MLflow"))
        self.client = SyncPrefectClient(f"{self.prefect}/api")

    def address(self, name: str) -> str:
        """An address that it printed."""
        return next(line.split()[1] for line in self.output if line.startswith(name))

    def start(self, deployment: str, **parameters: Any) -> UUID:
        """Start a run of a deployment, as the page does; a flow's own one has the flow's name."""
        full = deployment if "/" in deployment else f"{deployment}/{deployment}"
        found = self.client.read_deployment_by_name(full)
        return self.client.create_flow_run_from_deployment(found.id, parameters=parameters).id

    def state(self, run: UUID) -> State[Any]:
        """A run's state."""
        state = self.client.read_flow_run(run).state
        assert state is not None
        return state

    def tasks(self, run: UUID) -> dict[str, TaskRun]:
        """Task runs by name, but for those that the server lists a moment before they have a state."""
        found = self.client.read_task_runs(flow_run_filter=this_run(run))
        return {task.name: task for task in found if task.state}

    def run(self, flow: str = "pipeline", workers: int = 2, **parameters: Any) -> dict[str, float]:
        """Seconds of a run of a flow, from the click to its last state, and from its first expert to its last."""
        started = time.monotonic()
        run = self.start(flow, machine={"devices": "cpu", "workers": workers}, **parameters)
        while not (state := self.state(run)).is_final():
            time.sleep(0.5)
        seconds = time.monotonic() - started
        if not state.is_completed():
            raise SystemExit(f"the run ended as {state.name}: {state.message}")
        experts = [task for name, task in self.tasks(run).items() if name.startswith("expert@")]
        begun = min(task.start_time.timestamp() for task in experts if task.start_time)
        ended = max(task.end_time.timestamp() for task in experts if task.end_time)
        return {"all": seconds, "experts": ended - begun}

    def stop(self, number: int = signal.SIGINT) -> int:
        """Ctrl-C, and wait for the end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=300)
        self.output.append(output)
        return self.process.returncode


def this_run(run: UUID) -> FlowRunFilter:
    """Prefect's filter for one run."""
    from prefect.client.schemas.filters import FlowRunFilter

    return FlowRunFilter.model_validate({"id": {"any_": [run]}})


def outdate_experts(root: Path) -> list[str]:
    """Give each expert a learning rate of its own; returns their names."""
    path = root / "params.yaml"
    params = yaml.safe_load(path.read_text())
    for expert in params["experts"].values():
        expert["lr"] = 0.99 * params["training"]["lr"]
    path.write_text(yaml.safe_dump(params, sort_keys=False))
    return list(params["experts"])


def race_experts(sequential: Path, flowing: Path) -> dict[str, dict[str, float]]:
    """Four experts one after another, and two at a time, in finished projects."""
    stages = [f"expert@{name}" for name in outdate_experts(sequential)]
    started = time.monotonic()
    command = [sys.executable, "-m", "dvc", "repro", "--single-item", *stages]
    subprocess.run(command, cwd=sequential, env=environment(sequential), check=True, stdout=subprocess.DEVNULL)
    figures = {"experts, one after another": {"all": time.monotonic() - started}}
    names = outdate_experts(flowing)
    page = Page(flowing)
    try:
        figures["experts, two at a time"] = page.run("train-expert", experts=names)
    finally:
        page.stop()
    return figures


def lock_differences(one: Path, other: Path) -> list[str]:
    """Outputs that differ between two clones by more than what was measured, and stages that only one has."""
    locks = [yaml.safe_load((root / "dvc.lock").read_text())["stages"] for root in (one, other)]
    found = sorted(set(locks[0]) ^ set(locks[1]))
    for stage in set(locks[0]) & set(locks[1]):
        for kind in ("cmd", "params"):
            if locks[0][stage].get(kind) != locks[1][stage].get(kind):
                found.append(f"{stage}: {kind}")
        for left, right in zip(locks[0][stage]["outs"], locks[1][stage]["outs"], strict=True):
            if left["md5"] != right["md5"]:
                found += _file_differences(one, other, left["path"])
    return found


def _file_differences(one: Path, other: Path, path: str) -> list[str]:
    files = [file for file in (one / path).rglob("*") if file.is_file()] if (one / path).is_dir() else [one / path]
    different = []
    for file in files:
        twin = other / file.relative_to(one)
        if not twin.is_file() or _computed(file) != _computed(twin):
            different.append(str(file.relative_to(one)))
    return different


def _computed(file: Path) -> object:
    """Content of a file without what was measured; page, card and plots, which show that, are not looked into."""
    if file.suffix == ".json":
        lines = file.read_text().splitlines()
        return [line for line in lines if not MEASURED.search(line)]
    return None if file.suffix in (".html", ".md", ".svg", ".png") else file.read_bytes()


def main() -> None:
    """Run everything, print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where the clones go (default: a temporary folder, removed)")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--only", nargs="+", choices=RUNS, help="some of the runs")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="mode-orchestration-"))
    wanted = options.only or RUNS
    figures: dict[str, dict[str, float]] = {}
    try:
        if "plain" in wanted:
            figures["plain"] = run_plain(clone(folder / "plain"))
            print("plain", figures["plain"], flush=True)
        if "dvc" in wanted:
            figures["dvc"] = run_dvc(clone(folder / "dvc"))
            print("dvc", figures["dvc"], flush=True)
        for workers in (1, 2):
            if f"flow-{workers}" not in wanted:
                continue
            root = clone(folder / f"flow-{workers}")
            page = Page(root)
            try:
                figures[f"flow-{workers}"] = page.run(workers=workers)
                print(f"flow-{workers}", figures[f"flow-{workers}"], flush=True)
                figures[f"nothing to do ({workers})"] = {"all": page.run(workers=workers)["all"]}
                print("nothing to do", figures[f"nothing to do ({workers})"], flush=True)
            finally:
                page.stop()
            if "dvc" in wanted:
                print("dvc.lock differs in:", lock_differences(folder / "dvc", root) or "nothing", flush=True)
        if "experts" in wanted:  # in the projects that the others have left
            figures |= race_experts(folder / "dvc", folder / "flow-2")
            for name in list(figures)[-2:]:
                print(name, figures[name], flush=True)
            print("dvc.lock differs in:", lock_differences(folder / "dvc", folder / "flow-2") or "nothing", flush=True)
        if options.output:
            options.output.write_text(json.dumps(figures, indent=2) + "\n")
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
