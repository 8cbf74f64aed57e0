"""The runs of an experiment, each an experiment of DVC: `python -m flows.runs NAME`, or `mode experiment NAME`.

A run is `dvc exp run` in a clone of the project, with the project's cache: stages that two runs have in common are made
once and taken from DVC's run cache by the other. What is committed decides; what a run made comes back as an experiment
of the project (`dvc exp show --all-commits`), as a run in MLflow, and as rows of experiments/results/NAME.parquet.

Two runs that share a training do not start side by side: the second would make what the first is about to leave in the
cache. A run that was interrupted goes on in its clone, from its checkpoints. One that is done is not made again, nor
is one (but with `--anew`) that was made elsewhere and whose figures are in experiments/results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from flows.clones import cache_of, code_of, command, environment, git, head_of
from flows.devices import Place, places_for, stage_settings, visible_gpus
from flows.locks import Lock, holder, is_held, take
from flows.overrides import set_params
from flows.progress import TRAININGS
from flows.supervise import STOPPED, errors_in, shown, supervised
from mode.errors import ModeError
from mode.experiments.definition import Experiment, load_experiment
from mode.experiments.findings import figures_of_runs
from mode.experiments.plan import PlannedRun, plan_runs, plan_table
from mode.experiments.table import load_table, save_table, tidy, with_start
from mode.files import write_aside
from mode.parallel import cores
from mode.params import load_params
from mode.paths import Paths, RunPaths
from mode.reporting.summary import duration, quantity
from mode.results import Results
from mode.stages.project import BUILT_IN, Project, cards_of, write_json
from mode.stages.sources import keep_clusters_watch, keep_seed_watch, keep_tasks_watch, keep_watch
from mode.tracking.runs import Tracker

_STARTED = re.compile(r"^Running stage '(.+)':")
#: A run that ended so was told to stop, and goes on the next time.
_TOLD = frozenset({STOPPED, 128 + signal.SIGINT})
POLL_SECONDS = 0.3


@dataclass
class Active:
    """A run under way."""

    run: PlannedRun
    process: subprocess.Popen[str]
    locks: tuple[Lock, ...]
    began: float
    follower: threading.Thread | None = None
    tail: list[str] = field(default_factory=list)
    told: bool = False


class Runner:
    """Makes the runs of one experiment.

    Args:
        root: of the project, whose last commit all runs are of.
        name, experiment: the definition.
        runs: all that are planned: those that are done make the table.
        chosen: those of them to make.
        quick: figures mean nothing: they stay out of experiments/results.
        keep: leave the clones, for a look at models and pages.
        known: figures that experiments/results has, by the identity of their runs.
        anew: make those runs too; until then the table keeps their figures.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        experiment: Experiment,
        runs: Sequence[PlannedRun],
        chosen: Sequence[PlannedRun],
        quick: bool,
        keep: bool,
        known: Mapping[str, pd.DataFrame] | None = None,
        anew: bool = False,
    ) -> None:
        self.root, self.name, self.experiment, self.runs, self.chosen = root, name, experiment, runs, chosen
        self.quick, self.keep, self.paths, self.known = quick, keep, Paths(root), known or {}
        self.anew = anew
        self.failed: dict[str, str] = {}
        self._began = time.monotonic()
        self._stopping = self._said_who = False

    def files(self, run: PlannedRun) -> RunPaths:
        return self.paths.experiment_run(run.key)

    def is_done(self, run: PlannedRun) -> bool:
        """Whether its figures are there, and its models that other runs start from."""
        files = self.files(run)
        has_figures = files.rows.is_file() or self._was_made_before(run)
        return has_figures and all(files.kept(model).is_dir() for model in self.models_to_keep(run))

    def _was_made_before(self, run: PlannedRun) -> bool:
        """Whether its figures are enough, though this project has not made it."""
        return run.identity in self.known and not self.anew

    def models_to_keep(self, run: PlannedRun) -> set[str]:
        """Models of a run that others start from which were not made before."""
        starting = [other for other in self.runs if other.needs and other.needs[0] == run.key]
        return {other.needs[1] for other in starting if other.needs and not self._was_made_before(other)}

    def figures(self, run: PlannedRun) -> pd.DataFrame | None:
        """What is known of a run; what this project has made goes first."""
        rows = self.files(run).rows
        return load_table(rows) if rows.is_file() else self.known.get(run.identity)

    def rate(self) -> float | None:
        """Samples per second of one training, over all that finished runs of this project took; None: of none.

        Long trainings decide: those of `--quick` are mostly a start.
        """
        samples = seconds = 0.0
        for files in self.paths.all_runs():
            if not files.rows.is_file():
                continue
            arms = load_table(files.rows).drop_duplicates("arm").query("models == 1 and seconds > 0 and samples > 0")
            samples, seconds = samples + arms["samples"].sum(), seconds + arms["seconds"].sum()
        return samples / seconds if seconds else None

    def made(self) -> set[str]:
        """Keys of the trainings that finished runs of any experiment have left in the cache, by today's code."""
        found = [_read_made(files.trainings) for files in self.paths.all_runs() if files.trainings.is_file()]
        return {key for made in found if made.code == self._code for key in made.trainings}

    @cached_property
    def _code(self) -> str:
        """Of the trainings that begin now."""
        return code_of(self.root, "HEAD", TRAININGS)

    def make(self, places: Sequence[Place]) -> int:
        """Make the chosen that are not done, as many side by side as there are places; returns the exit code."""
        waiting = [run for run in self.chosen if not self.is_done(run)]
        active: list[Active] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._told)
        while waiting or active:
            waiting = [run for run in waiting if not self.is_done(run)]  # one like it may have been made by now
            while not self._stopping and (run := self._next(waiting, active)) and (room := self._room(run, places)):
                waiting.remove(run)
                try:
                    active.append(self._start(run, *room, places))
                except (ModeError, OSError) as error:
                    _let_go(room[1])
                    self._fail(run, error)
            for each in [each for each in active if each.process.poll() is not None]:
                active.remove(each)
                self._finish(each)
            if waiting and not active and not self._stopping and not any(map(self._has_its_start, waiting)):
                self.failed |= {run.name: "the run that it starts from has failed" for run in waiting}
                waiting.clear()
            if waiting and not active and not self._stopping:
                self._say_who_is_before(waiting, places)
            if self._stopping:
                waiting.clear()
                for each in active:
                    self._stop(each)
            time.sleep(POLL_SECONDS)
        self.collect()
        if self._stopping:
            print("stopped: the same command goes on from here", flush=True)
            return 130
        for name, why in self.failed.items():
            print(f"failed: {name}: {why}", file=sys.stderr, flush=True)
        return 1 if self.failed else 0

    def collect(self) -> None:
        """Put the figures of all runs into one table, with the definition's runs beside it."""
        tables: list[pd.DataFrame] = []
        identities: dict[str, dict[str, str]] = {}
        for run in self.runs:
            if (found := self.figures(run)) is not None:
                tables.append(found.assign(experiment=self.name, run=run.run, random_seed=run.seed))
                identities.setdefault(run.run, {})[str(run.seed)] = run.identity
        if not tables:
            return
        path = self.paths.experiment_table(self.name, self.quick)
        save_table(pd.concat(tables, ignore_index=True), path)
        about = {
            "command": f"mode experiment {self.name}",
            "commit": sorted({commit for table in tables for commit in table["commit"].unique()}),
            "runs": {name: own_parameters(self.experiment, name, self.quick) for name in self.experiment.runs},
            "identities": identities,
        }
        write_json(path.with_suffix(".json"), about)

    def _told(self, _number: int, _frame: object) -> None:
        if not self._stopping:
            print("\nstopping: trainings write their checkpoints ...", file=sys.stderr, flush=True)
        self._stopping = True

    def _stop(self, active: Active) -> None:
        """Tell a run to write its checkpoint and end, once."""
        if not active.told:
            active.told = True
            active.process.terminate()

    def _next(self, waiting: Sequence[PlannedRun], active: Sequence[Active]) -> PlannedRun | None:
        """The first run of which nothing is being trained just now that it could take from the cache afterwards.

        One that starts from another's model waits for that.
        """
        under_way = {key for each in active for key in each.run.trainings} - self.made()
        ready = filter(self._has_its_start, waiting)
        return next((run for run in ready if not run.trainings & under_way and not is_held(self.files(run).lock)), None)

    def _has_its_start(self, run: PlannedRun) -> bool:
        return not run.needs or kept_model(self.paths, *run.needs).is_dir()

    def _room(self, run: PlannedRun, places: Sequence[Place]) -> tuple[Place, tuple[Lock, ...]] | None:
        """A free place, locked, and the run's own lock; None: all places are taken, or it is being made.

        Another experiment may have the same run, and be made at the same time.
        """
        who = f"{run.name}, process {os.getpid()}"
        if own := take(self.files(run).lock, who):
            for place in places:
                if slot := place.take(who):
                    return place, (own, *slot.locks)
            own.close()
        return None

    def _say_who_is_before(self, waiting: Sequence[PlannedRun], places: Sequence[Place]) -> None:
        """Say once what all runs wait for: their own locks, or places, that others have."""
        locks = [*(self.files(run).lock for run in waiting), *(lock for place in places for lock in place.locks)]
        if not self._said_who and (holders := sorted({holder(lock) for lock in locks if is_held(lock)})):
            self._said_who = True
            print(f"waiting for {', '.join(holders)}", flush=True)

    def _start(self, run: PlannedRun, place: Place, locks: tuple[Lock, ...], places: Sequence[Place]) -> Active:
        """Start a run in its place, one of these, with its locks, which its last process frees."""
        clone = self._prepared(run)
        # Runs on a GPU share the cores; on the CPU, each has one.
        threads = 1 if place.device == "cpu" else max(1, cores() // len(places))
        targets = ["evaluate", "variants"] if run.params.variants.arms else ["evaluate"]
        process = supervised(
            [sys.executable, "-m", "dvc", "exp", "run", "--name", run.name, *set_params(run.overrides), *targets],
            environment(clone, self.root) | stage_settings(place.settings, threads, ""),
            load_params(self.paths.params_file).machine.stop_seconds,
            [lock.fileno() for lock in locks],
            folder=clone,
            alone=True,  # Ctrl-C reaches this process alone, which tells the others
        )
        active = Active(run, process, locks, time.monotonic())
        active.follower = threading.Thread(target=self._follow, args=(active,), daemon=True)
        active.follower.start()
        self._say(run, f"started on {place.device}")
        return active

    def _prepared(self, run: PlannedRun) -> Path:
        """The run's clone of the project: a new one, or that of the interrupted run."""
        files, commit = self.files(run), head_of(self.root)
        clone, of = files.clone, files.commit
        if clone.is_dir() and not (of.is_file() and of.read_text(encoding="utf-8") == commit):
            shutil.rmtree(clone)  # of another commit; what is the same comes out of the cache
        if clone.is_dir():
            # What is left of a run whose figures were not taken over: DVC makes no second experiment of one name.
            for ref in git(clone, "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{run.name}").split():
                git(clone, "update-ref", "-d", ref)
            return clone
        of.write_text(commit, encoding="utf-8")
        with write_aside(clone) as new:
            git(self.root, "clone", "--quiet", "--shared", "--no-tags", str(self.root), str(new))
            config = ["[cache]", f"    dir = {cache_of(self.root)}", "    type = reflink,copy"]
            (new / ".dvc" / "config.local").write_text("\n".join(config) + "\n", encoding="utf-8")
            project = Project(new, run.params)
            for source, params in run.params.sources.items():
                keep_watch(project, source, generated=params.shards == BUILT_IN)
            keep_tasks_watch(project)
            keep_seed_watch(project)
            keep_clusters_watch(project)
        return clone

    def _follow(self, active: Active) -> None:
        """Keep a run's output in its log, and say which stage it has come to."""
        assert active.process.stdout is not None
        with self.files(active.run).log.open("a", encoding="utf-8") as log:
            for raw in active.process.stdout:
                log.write(raw)
                log.flush()
                line = shown(raw)
                active.tail = [*active.tail[-20:], line]
                if found := _STARTED.match(line):
                    self._say(active.run, found[1])

    def _finish(self, active: Active) -> None:
        """Take over what a run has made, or note why there is nothing."""
        run, code = active.run, active.process.returncode
        assert active.follower is not None
        active.follower.join()  # its last line may be the one that says why
        try:
            if self._stopping:
                return
            if code in _TOLD:
                raise ModeError("stopped from outside", "the same command goes on from here")
            if code:
                why = [f"exit code {code}", *errors_in(active.tail)][-1]
                raise ModeError(f"{why} (see {self.files(run).log})")
            self._take(run)
        except (ModeError, OSError) as error:
            self._fail(run, error)
            return
        finally:
            _let_go(active.locks)
        left = sum(not self.is_done(each) for each in self.chosen)
        self._say(run, f"done in {duration(time.monotonic() - active.began)}; {left} of {len(self.chosen)} runs left")
        self.collect()

    def _fail(self, run: PlannedRun, error: Exception) -> None:
        self.failed[run.name] = str(error)
        self._say(run, f"failed: {error}")

    def _take(self, run: PlannedRun) -> None:
        """The rows of a run, its experiment of DVC, its run in MLflow; its clone goes."""
        files = self.files(run)
        paths = Paths(files.clone)
        results = Results.load(paths.metrics)
        variants = Results.load(paths.variants) if paths.variants.is_file() else None
        rows = tidy(
            results,
            variants,
            experiment=run.experiment,
            run=run.run,
            random_seed=run.seed,
            commit=files.commit.read_text(encoding="utf-8"),
            device=_devices(paths),
        )
        if run.needs:
            key, model = run.needs
            rows = with_start(rows, load_table(self.paths.experiment_run(key).rows), model)
        command(files.clone, self.root, "dvc", "exp", "push", "--quiet", "--force", "--no-cache", "origin", run.name)
        tags = {"experiment": run.experiment, "run": run.run, "random_seed": str(run.seed)}
        Tracker(self.paths.runs, experiment="experiments").log_arms(
            run.name, [results, *([variants] if variants else [])], params=run.overrides, tags=tags
        )
        for model in self.models_to_keep(run):
            shutil.rmtree(files.kept(model), ignore_errors=True)
            files.kept(model).parent.mkdir(exist_ok=True)
            command(files.clone, self.root, "mode.cli", "export-model", model, str(files.kept(model)))
        code = code_of(self.root, files.commit.read_text(encoding="utf-8"), TRAININGS)
        write_json(files.trainings, {"code": code, "trainings": sorted(run.trainings)})
        save_table(rows, files.rows)
        if not self.keep:
            shutil.rmtree(files.clone, ignore_errors=True)

    def _say(self, run: PlannedRun, what: str) -> None:
        print(f"{duration(time.monotonic() - self._began):>12}  {run.run} seed {run.seed}: {what}", flush=True)


def kept_model(paths: Paths, key: str, model: str) -> Path:
    """Where the run of this key leaves a model that another run starts from."""
    return paths.experiment_run(key).kept(model)


def _devices(paths: Paths) -> str:
    """What the models of a run were trained on; those out of the cache may be another machine's."""
    names = [card.parent.name for card in paths.models.glob("*/card.json")]
    cards = cards_of(paths.models, names).values()
    found = {card["provenance"]["device"] for card in cards if "device" in card.get("provenance", {})}
    named = {"cpu": f"{platform.machine()} CPU, {cores()} cores"}
    return ", ".join(sorted(named.get(device, device) for device in found)) or "nothing"


def _let_go(locks: Iterable[Lock]) -> None:
    for lock in locks:
        lock.close()


class _Made(NamedTuple):
    """What a finished run has left: keys of trainings, and the code that made them."""

    code: str
    trainings: list[str]


def _read_made(path: Path) -> _Made:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, list):  # of a version that did not note the code
        content = {"code": "unknown", "trainings": content}
    match content:
        case {"code": str(code), "trainings": list(keys)} if all(isinstance(key, str) for key in keys):
            return _Made(code, keys)
    raise ModeError(f"{path}: damaged", f"remove {path.parent}: its run is made again, out of the cache")


def own_parameters(experiment: Experiment, run: str, quick: bool = False) -> dict[str, Any]:
    """What makes a run what it is, as it may be committed: folders and models by name, not by where they lie here."""
    start = experiment.runs[run].starts_from
    values = experiment.overrides(run, experiment.seeds[0], {}, quick, Path(start.run, start.arm) if start else None)
    return {key: value for key, value in values.items() if key != "random_seed"}


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
            raise ModeError(f"--data {text}: no folder", "--data NAME=FOLDER")
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
    root = Path.cwd()
    paths = Paths(root)
    try:
        if not paths.dvc_file.is_file():
            raise ModeError(f"{root}: no dvc.yaml", "run it in the project's folder")
        if Path(options.name).name != options.name:
            raise ModeError(f"{options.name}: no name for an experiment", "of experiments/NAME.yaml")
        experiment = load_experiment(paths.experiment(options.name))
        if unknown := [run for run in options.runs or () if run not in experiment.runs]:
            raise ModeError(f"{options.name}: no run is called '{unknown[0]}'", ", ".join(experiment.runs))
        seeds = options.seeds or (experiment.seeds[:1] if options.quick else experiment.seeds)
        # What is done of the others stays in the table.
        every = [*dict.fromkeys([*([] if options.quick else experiment.seeds), *seeds])]
        load_params(paths.params_file)
        content = yaml.safe_load(paths.params_file.read_text(encoding="utf-8"))
        kept = partial(kept_model, paths)
        runs = plan_runs(options.name, experiment, content, folders(options.data), every, options.quick, kept)
        wanted = with_starts(experiment, options.runs or experiment.runs)
        chosen = [run for run in runs if run.run in wanted and run.seed in seeds]
        for run in chosen:
            set_params(run.overrides)  # here, and not when the run's turn has come
        known = {} if options.quick else figures_of_runs(paths.experiment_results, options.name)
        runner = Runner(root, options.name, experiment, runs, chosen, options.quick, options.keep, known, options.anew)
        places = runs_side_by_side(options.jobs, root)
        print(f"{options.name}: {experiment.title}")
        done = [run.name for run in chosen if runner.is_done(run)]
        print(show_plan(chosen, done, runner.rate(), len(places), runner.made()))
        if options.plan:
            return 0
        head_of(root)
        if git(root, "status", "--porcelain", "--untracked-files=no", "src", "dvc.yaml", "params.yaml"):
            raise ModeError("uncommitted changes in src, dvc.yaml or params.yaml", "commit them: runs are of a commit")
        lock = take(paths.experiment_lock(options.name), f"process {os.getpid()}")
        if lock is None:
            who = holder(paths.experiment_lock(options.name))
            raise ModeError(f"experiment {options.name} is being run by {who}", "wait for it or stop it")
        with lock:
            return runner.make(places)
    except ModeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before anything has started
        return 130


if __name__ == "__main__":
    sys.exit(main())
