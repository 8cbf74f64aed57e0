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
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

import yaml
from dvc.utils.serialize import modify_yaml

from benchmarks.study import clone, dvc, environment

if TYPE_CHECKING:
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.objects import State, TaskRun

#: What a file may say that is measured, not computed.
MEASURED = re.compile(r'"(seconds|threads|mlflow_run|commit|uncommitted_changes)"')

RUNS = ["plain", "dvc", "flow-1", "flow-2", "experts"]
#: Seconds of `all`, and of the `experts` alone.
Seconds = dict[str, float]

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


def stages_in_order(root: Path) -> list[str]:
    """Stages of dvc.yaml by address, in an order in which they can run."""
    code = "from flows.graph import in_order, read; from pathlib import Path; print(*in_order(read(Path.cwd())[0]))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment(root), capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def run_plain(root: Path) -> Seconds:
    """Every stage by itself."""
    stages = {}
    for stage in stages_in_order(root):
        started = time.monotonic()
        command = [sys.executable, "-c", UNTRACKED, *stage.split("@")]
        subprocess.run(command, cwd=root, env=environment(root), check=True, stdout=subprocess.DEVNULL)
        stages[stage] = time.monotonic() - started
    return {"all": sum(stages.values()), "experts": of_experts(stages)}


def run_dvc(root: Path) -> Seconds:
    """The same of `dvc repro`."""
    started = time.monotonic()
    stages = dvc(root, "repro")
    return {"all": time.monotonic() - started, "experts": of_experts(stages)}


def of_experts(stages: Mapping[str, float]) -> float:
    """Seconds of all experts together."""
    return sum(seconds for stage, seconds in stages.items() if stage.startswith("expert@"))


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

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
    with modify_yaml(root / "params.yaml") as params:  # as `dvc exp run` does, which would be timed as well
        for expert in params["experts"].values():
            expert["lr"] = 0.99 * params["training"]["lr"]
        return list(params["experts"])


def race_experts(sequential: Path, flowing: Path) -> dict[str, Seconds]:
    """Four experts one after another, and two at a time, in finished projects."""
    stages = [f"expert@{name}" for name in outdate_experts(sequential)]
    started = time.monotonic()
    dvc(sequential, "repro", "--single-item", *stages)
    figures: dict[str, Seconds] = {"experts, one after another": {"all": time.monotonic() - started}}
    names = outdate_experts(flowing)
    with Page(flowing) as page:
        figures["experts, two at a time"] = page.run("train-expert", experts=names)
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
    figures: dict[str, Seconds] = {}

    def show(found: dict[str, Seconds]) -> None:
        figures.update(found)
        for name, seconds in found.items():
            print(name, seconds, flush=True)

    def compare_locks(one: Path, other: Path) -> None:
        print("dvc.lock differs in:", lock_differences(one, other) or "nothing", flush=True)

    try:
        if "plain" in wanted:
            show({"plain": run_plain(clone(folder / "plain"))})
        if "dvc" in wanted:
            show({"dvc": run_dvc(clone(folder / "dvc"))})
        for workers in (1, 2):
            if f"flow-{workers}" not in wanted:
                continue
            root = clone(folder / f"flow-{workers}")
            with Page(root) as page:
                show({f"flow-{workers}": page.run(workers=workers)})
                show({f"nothing to do ({workers})": {"all": page.run(workers=workers)["all"]}})
            if "dvc" in wanted:
                compare_locks(folder / "dvc", root)
        if "experts" in wanted:  # in the projects that the others have left
            show(race_experts(folder / "dvc", folder / "flow-2"))
            compare_locks(folder / "dvc", folder / "flow-2")
        if options.output:
            options.output.write_text(json.dumps(figures, indent=2) + "\n")
    finally:
        if not options.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
