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
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import UUID

import yaml
from dvc.utils.serialize import modify_yaml

from benchmarks.study import clone, dvc, environment
from flows.graph import in_order, read
from flows.server import LOG_IN

if TYPE_CHECKING:
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.objects import State, TaskRun

#: What a file may say that is measured, not computed.
MEASURED = re.compile(r'"(seconds|threads|mlflow_run|commit|uncommitted_changes|checksum)"')

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


def run_plain(root: Path) -> Seconds:
    """Every stage by itself."""
    stages = {}
    for stage in in_order(read(root)[0]):
        started = time.monotonic()
        command = [sys.executable, "-c", UNTRACKED, *stage.split("@")]
        subprocess.run(command, cwd=root, env=environment(root), check=True, stdout=subprocess.DEVNULL)
        stages[stage] = time.monotonic() - started
    return {"all": sum(stages.values()), "experts": of_experts(stages)}


def of_experts(stages: Mapping[str, float]) -> float:
    """Seconds of all experts together."""
    return sum(seconds for stage, seconds in stages.items() if stage.startswith("expert@"))


def run_dvc(root: Path, *arguments: str) -> Seconds:
    """The same of `dvc repro`."""
    started = time.monotonic()
    stages = dvc(root, "repro", *arguments)
    return {"all": time.monotonic() - started, "experts": of_experts(stages)}


class Page(AbstractContextManager["Page"]):
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
        command = [sys.executable, "-m", "flows.ui", "--prefect-port", "0", "--mlflow-port", "0", *options]
        settings = settings or environment(root)
        self.process = subprocess.Popen(
            command, cwd=root, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.output: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if line.startswith("Ctrl-C"):
                break
        else:
            raise RuntimeError(f"the page did not start: {''.join(self.output)}")
        self.log_in, self.mlflow = (self.address(name) for name in ("Prefect", "MLflow"))
        self.prefect, _, self.secret = self.log_in.partition(f"{LOG_IN}#")
        self.client = SyncPrefectClient(f"{self.prefect}/api", auth_string=self.secret)

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
        begun = min(task.start_time for task in experts if task.start_time)
        ended = max(task.end_time for task in experts if task.end_time)
        return {"all": seconds, "experts": (ended - begun).total_seconds()}

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
    one_by_one = run_dvc(sequential, "--single-item", *stages)["all"]
    names = outdate_experts(flowing)
    with Page(flowing) as page:
        two_at_a_time = page.run("train-expert", experts=names)
    return {"experts, one after another": {"all": one_by_one}, "experts, two at a time": two_at_a_time}


def lock_differences(one: Path, other: Path) -> list[str]:
    """Outputs that differ between two clones by more than what was measured, and stages that only one has."""
    left, right = (yaml.safe_load((root / "dvc.lock").read_text())["stages"] for root in (one, other))
    found = sorted(left.keys() ^ right.keys())
    for stage in left.keys() & right.keys():
        found += [f"{stage}: {kind}" for kind in ("cmd", "params") if left[stage].get(kind) != right[stage].get(kind)]
        for ours, theirs in zip(left[stage]["outs"], right[stage]["outs"], strict=True):
            if ours["md5"] != theirs["md5"]:
                found += _file_differences(one, other, ours["path"])
    return found


def _file_differences(one: Path, other: Path, path: str) -> list[str]:
    files = [file for file in (one / path, *(one / path).rglob("*")) if file.is_file()]
    names = [file.relative_to(one) for file in files]
    return [
        str(name) for name in names if not (other / name).is_file() or _computed(one / name) != _computed(other / name)
    ]


def _computed(file: Path) -> object:
    """Content of a file without what was measured; page, card and plots, which show that, are not looked into."""
    if file.suffix == ".json":
        return [line for line in file.read_text().splitlines() if not MEASURED.search(line)]
    if file.name == "SHA256SUMS":  # of a card, in which times stand
        return [line for line in file.read_text().splitlines() if not line.endswith(".json")]
    return None if file.suffix in (".html", ".md", ".svg", ".png") else file.read_bytes()


def main() -> None:
    """Run everything, print the table, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where the clones go (default: a temporary folder, removed)")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=RUNS, help="some of the runs")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="mode-orchestration-", ignore_cleanup_errors=True) as temporary:
        figures = race(options.folder or Path(temporary), options.only)
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n")


def race(folder: Path, wanted: Sequence[str]) -> dict[str, Seconds]:
    """The runs that are wanted, each in a clone of its own in the folder; prints their figures as they come."""
    figures: dict[str, Seconds] = {}

    def show(name: str, seconds: Seconds) -> None:
        figures[name] = seconds
        print(name, seconds, flush=True)

    def compare_locks(other: str) -> None:
        print("dvc.lock differs in:", lock_differences(folder / "dvc", folder / other) or "nothing", flush=True)

    if "plain" in wanted:
        show("plain", run_plain(clone(folder / "plain")))
    if "dvc" in wanted:
        show("dvc", run_dvc(clone(folder / "dvc")))
    for workers in (1, 2):
        name = f"flow-{workers}"
        if name not in wanted:
            continue
        with Page(clone(folder / name)) as page:
            show(name, page.run(workers=workers))
            show(f"nothing to do ({workers})", {"all": page.run(workers=workers)["all"]})
        if "dvc" in wanted:
            compare_locks(name)
    if "experts" in wanted:  # in the projects that the others have left
        for name, seconds in race_experts(folder / "dvc", folder / "flow-2").items():
            show(name, seconds)
        compare_locks("flow-2")
    return figures


if __name__ == "__main__":
    main()
