"""What the runs of an experiment have left, here or elsewhere: figures, models that others start from, trainings."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from flows.clones import code_of, command
from flows.progress import TRAININGS
from mode.clip.folder import CARD
from mode.errors import ModeError
from mode.experiments.definition import Experiment
from mode.experiments.plan import PlannedRun
from mode.experiments.table import load_table, save_table, tidy, with_start
from mode.parallel import cores
from mode.paths import Paths, RunPaths
from mode.results import Results
from mode.stages.project import cards_of, write_json
from mode.tracking.runs import Tracker


class Ledger:
    """What there is of the runs of one experiment, and what a new one is entered into.

    Args:
        root: of the project.
        name, experiment: the definition.
        runs: all that are planned: those that are done make the table.
        quick: figures mean nothing: they stay out of experiments/results.
        known: figures that experiments/results has, by the identity of their runs.
        anew: those do not count as made; until they are, the table keeps their figures.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        experiment: Experiment,
        runs: Sequence[PlannedRun],
        quick: bool = False,
        known: Mapping[str, pd.DataFrame] | None = None,
        anew: bool = False,
    ) -> None:
        self.root, self.name, self.experiment, self.runs = root, name, experiment, runs
        self.quick, self.paths, self.known, self.anew = quick, Paths(root), known or {}, anew

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

    def has_its_start(self, run: PlannedRun) -> bool:
        """Whether the model of another run that it starts from is there."""
        return not run.needs or self.paths.kept_model(*run.needs).is_dir()

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

    def enter(self, run: PlannedRun) -> None:
        """Take over from its clone what a run has made: its experiment of DVC, its run in MLflow, models, its rows."""
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


def _devices(paths: Paths) -> str:
    """What the models of a run were trained on; those out of the cache may be another machine's."""
    names = [card.parent.name for card in paths.models.glob(f"*/{CARD}")]
    cards = cards_of(paths.models, names).values()
    found = {card["provenance"]["device"] for card in cards if "device" in card.get("provenance", {})}
    named = {"cpu": f"{platform.machine()} CPU, {cores()} cores"}
    return ", ".join(sorted(named.get(device, device) for device in found)) or "nothing"
