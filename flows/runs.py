"""The runs of an experiment, each an experiment of DVC: `python -m flows.runs NAME`, or `mode experiment NAME`.

A run is `dvc exp run` in a clone of the project, with the project's cache: stages that two runs have in common are made
once and taken from DVC's run cache by the other. What is committed decides; what a run made comes back as an experiment
of the project (`dvc exp show --all-commits`), as a run in MLflow, and as rows of experiments/results/NAME.parquet.

A run that is done is not made again, nor is one (but with `--anew`) that was made elsewhere and whose figures are in
experiments/results.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import yaml

from flows.clones import git, head_of
from flows.devices import Place, places_for, visible_gpus
from flows.ledger import Ledger
from flows.locks import holder, take
from flows.overrides import set_params
from flows.runner import Runner
from mode.errors import ModeError, exit_code_of
from mode.experiments.definition import Experiment, load_experiment
from mode.experiments.findings import figures_of_runs
from mode.experiments.plan import PlannedRun, plan_runs, plan_table
from mode.parallel import cores
from mode.params import load_params
from mode.paths import Paths
from mode.reporting.summary import duration, quantity


def runs_side_by_side(jobs: int | None, root: Path) -> list[Place]:
    """Where `jobs` runs fit side by side: on GPUs that share them evenly, or on the cores; None: one for each."""
    per_gpu = -(-(jobs or 1) // max(1, len(visible_gpus())))
    return places_for("auto", jobs or cores(), per_gpu, root)[:jobs]


def show_plan(
    runs: Sequence[PlannedRun], done: Iterable[str], rate: float | None, jobs: int, made: Iterable[str] = ()
) -> str:
    """The plan as text; arguments as of `plan_table`."""
    table = plan_table(runs, done, rate, jobs, made)
    shown = table.assign(
        samples=table["samples"].map(quantity), hours=table["hours"].map(lambda hours: duration(3600 * hours))
    ).rename(columns={"hours": "time"})
    basis = (
        f"at {rate:,.0f} samples/s a training, as runs here took"
        if rate
        else "the first finished run will tell how long"
    )
    return f"{shown.to_string(index=False)}\n{basis}; stages in common are made once"


def folders(given: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` -> folder. Raises `ModeError` for what is none."""
    found = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder or not Path(folder).is_dir():
            raise ModeError(f"--data {text}: no folder is given", "write --data NAME=FOLDER")
        found[name] = Path(folder).resolve()
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="mode experiment", description="Make the runs of experiments/NAME.yaml.")
    made.add_argument("name", help="of the experiment")
    made.add_argument("--quick", action="store_true", help="see in minutes that everything works; figures mean nothing")
    made.add_argument("--seeds", type=_whole(0, 2**32 - 1), nargs="+", help="these random seeds alone")
    made.add_argument("--runs", nargs="+", metavar="RUN", help="these runs alone, and those that they start from")
    made.add_argument(
        "--jobs",
        type=_whole(1, 1024),
        help="runs side by side; default: one per GPU, or per core; more than there are GPUs share them",
    )
    made.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER", help="a folder that it needs")
    made.add_argument("--plan", action="store_true", help="print what would run, and stop")
    made.add_argument("--anew", action="store_true", help="also runs made elsewhere, whose figures are in the results")
    made.add_argument("--keep", action="store_true", help="leave the clones, with models and pages")
    return made


def _whole(least: int, most: int) -> Callable[[str], int]:
    """A whole number of a range, for argparse."""

    def number(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,12}", text) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} to {most}")
        return int(text)

    return number


def with_starts(experiment: Experiment, names: Iterable[str]) -> set[str]:
    """Names of runs, and of those that they start from."""
    wanted = set(names)
    for name, run in reversed(experiment.runs.items()):  # a run starts from one above it
        if name in wanted and run.starts_from:
            wanted.add(run.starts_from.run)
    return wanted


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan, print the plan, run; one line for what the user can mend."""
    options = parser().parse_args(arguments)
    try:
        return exit_code_of(lambda: _run(options, Path.cwd()))
    except KeyboardInterrupt:  # before anything has started
        return 130


def _run(options: argparse.Namespace, root: Path) -> int:
    """What `main` does, in a project; returns the exit code."""
    name, paths = options.name, Paths(root)
    if not paths.dvc_file.is_file():
        raise ModeError(f"{root}: no dvc.yaml", "run it in the project's folder")
    if Path(name).name != name:
        raise ModeError(f"{name}: no name for an experiment", "give the NAME of experiments/NAME.yaml")
    experiment = load_experiment(paths.experiment(name))
    runs, chosen = _planned(options, experiment, paths)
    known = {} if options.quick else figures_of_runs(paths.experiment_results, name)
    ledger = Ledger(root, name, experiment, runs, options.quick, known, options.anew)
    places = runs_side_by_side(options.jobs, root)
    print(f"{name}: {experiment.title}")
    done = [run.name for run in chosen if ledger.is_done(run)]
    print(show_plan(chosen, done, ledger.rate(), len(places), ledger.made()))
    if options.plan:
        return 0
    head_of(root)
    if git(root, "status", "--porcelain", "--untracked-files=no", "src", "dvc.yaml", "params.yaml"):
        raise ModeError("uncommitted changes in src, dvc.yaml or params.yaml", "commit them: runs are of a commit")
    lock = take(paths.experiment_lock(name), f"process {os.getpid()}")
    if lock is None:
        raise ModeError(
            f"experiment {name} is being run by {holder(paths.experiment_lock(name))}", "wait for it or stop it"
        )
    with lock:
        return Runner(ledger, chosen, options.keep).make(places)


def _planned(
    options: argparse.Namespace, experiment: Experiment, paths: Paths
) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """All runs of an experiment, and those of them that the command line asks for.

    Raises:
        ModeError: it asks for a run that there is not; or as `plan_runs`, `folders` and `set_params`.
    """
    if unknown := [run for run in options.runs or () if run not in experiment.runs]:
        raise ModeError(f"{options.name}: no run is called '{unknown[0]}'", f"there are: {', '.join(experiment.runs)}")
    seeds = options.seeds or (experiment.seeds[:1] if options.quick else experiment.seeds)
    # What is done of the others stays in the table.
    every = [*dict.fromkeys([*([] if options.quick else experiment.seeds), *seeds])]
    load_params(paths.params_file)
    content = yaml.safe_load(paths.params_file.read_text(encoding="utf-8"))
    data = folders(options.data)
    runs = plan_runs(options.name, experiment, content, data, every, options.quick, paths.kept_model)
    wanted = with_starts(experiment, options.runs or experiment.runs)
    chosen = [run for run in runs if run.run in wanted and run.seed in seeds]
    for run in chosen:
        set_params(run.overrides)  # here, and not when the run's turn has come
    return runs, chosen


if __name__ == "__main__":
    sys.exit(main())
