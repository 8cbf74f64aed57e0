"""What an experiment will run: the runs with their parameters, the trainings among them, and what these cost."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mode.data.loading.selection import Pairs
from mode.errors import ModeError
from mode.experiments.definition import Experiment
from mode.params import Params, parse_params
from mode.roles import DENSE, DENSE_LONG, ENSEMBLE, EXPERT, FULL, SEED, UNIFORM, UNIFORM_FULL, UPDATE, Role
from mode.training.plan import TrainPlan, make_plan

#: Sections of params.yaml that decide the seed, and so whether two runs share it, as the sources of its pairs do.
_OF_SEED = ("random_seed", "glyphs", "index", "seed", "model", "image", "training")
#: Beside these, what decides an expert of it.
_OF_EXPERT = ("embedding", "clustering", "branch")


class Work(NamedTuple):
    """A training: its model, what tells it from every other one, and how many samples it takes of its own."""

    model: str
    key: str
    samples: float


@dataclass(frozen=True)
class PlannedRun:
    """A run of an experiment with one random seed.

    Attributes:
        experiment, run, seed: which.
        overrides: parameters by dotted key; `experts` is the whole section.
        params: all of them, checked.
        key: 12 hexadecimal digits that tell it from every other run; the same run in another experiment has the same.
        identity: as `key`, but the same wherever the folders lie that it is given: by it the figures of a run are known
            that was made on another machine.
        work: its trainings.
        needs: (key of another run, its model) that this one starts from.
    """

    experiment: str
    run: str
    seed: int
    overrides: Mapping[str, Any]
    params: Params
    key: str
    identity: str
    work: tuple[Work, ...]
    needs: tuple[str, str] | None = None

    @property
    def trainings(self) -> set[str]:
        """Keys of its trainings."""
        return {work.key for work in self.work}

    @property
    def name(self) -> str:
        """Of the run in `dvc exp show`, in MLflow and in messages."""
        return f"{self.experiment}-{self.run}-{self.seed}"


def plan_runs(
    name: str,
    experiment: Experiment,
    content: Mapping[str, Any],
    data: Mapping[str, Path],
    seeds: Sequence[int] | None = None,
    quick: bool = False,
    kept: Callable[[str, str], Path] = lambda key, model: Path(key) / model,
) -> list[PlannedRun]:
    """All runs of an experiment: the first random seed of every run comes first, then the next.

    Args:
        name: of the experiment.
        experiment: its definition.
        content: of the project's params.yaml, which the overrides go on top of.
        data: folders by name.
        seeds: in place of the definition's.
        quick: with the changes of `--quick`.
        kept: (key of a run, model) -> the folder where that model is kept for runs that start from it.

    Raises:
        ModeError: a folder is not given, the parameters of a run are not valid, or a row is of an arm that its run
            will not have.
    """
    if missing := [each for each in experiment.data if each not in data]:
        raise ModeError(f"{name} needs {experiment.data[missing[0]]}", f"--data {missing[0]}=FOLDER")
    if unknown := [each for each in data if each not in experiment.data]:
        raise ModeError(
            f"--data {unknown[0]}: {name} has no data of that name", ", ".join(experiment.data) or "it needs none"
        )
    runs: list[PlannedRun] = []
    for seed in seeds if seeds is not None else experiment.seeds:
        of_seed: dict[str, PlannedRun] = {}
        for run, own in experiment.runs.items():
            needs = (of_seed[own.starts_from.run].key, own.starts_from.arm) if own.starts_from else None
            start = kept(*needs) if needs else None
            overrides = experiment.overrides(run, seed, data, quick, start)
            made = planned(name, run, seed, overrides, content)
            if data or needs:  # with names of folders, and the identity of the run that it starts from
                origin = Path(of_seed[own.starts_from.run].identity, own.starts_from.arm) if own.starts_from else None
                anywhere = experiment.overrides(run, seed, {}, quick, origin)
                made = replace(made, identity=planned(name, run, seed, anywhere, content).key)
            of_seed[run] = replace(made, needs=needs)
        for label, (run, arm) in experiment.rows.items():
            if not _has(arms := arms_of(of_seed[run].params), arm):
                raise ModeError(
                    f"experiments/{name}.yaml: rows.{label}: run '{run}' will have no arm '{arm}'", ", ".join(arms)
                )
        runs += of_seed.values()
    return runs


def arms_of(params: Params) -> list[str]:
    """The arms that a run with these parameters will have; `by-range` and `probe` stand for several each."""
    full = [FULL.model(key) for key in params.full]
    return [
        *(role.name for role in (SEED, DENSE)),
        *([DENSE_LONG.name] if params.baselines.dense_long else []),
        *([*full, UNIFORM_FULL.name] if full else []),
        *params.members,
        *(EXPERT.mean, UNIFORM.name, ENSEMBLE.name),
        *params.variants.arms,
    ]


def _has(arms: Iterable[str], arm: str) -> bool:
    return arm in arms or any(several in arms and arm.startswith(several) for several in ("by-range", "probe"))


def planned(name: str, run: str, seed: int, overrides: Mapping[str, Any], content: Mapping[str, Any]) -> PlannedRun:
    """A run with its parameters checked; see `plan_runs`."""
    params = parse_params(overridden(content, overrides), f"experiments/{name}.yaml: {run}")
    # Without defaults: a parameter that a later version adds must not make finished runs look like other ones.
    beside: dict[str, Any] = {"machine": True, "training": set(params.training.BESIDE)}
    values = params.model_dump(mode="json", exclude=beside, exclude_defaults=True)
    key = _digest(values)
    return PlannedRun(
        experiment=name,
        run=run,
        seed=seed,
        overrides=overrides,
        params=params,
        key=key,
        identity=key,
        work=tuple(_work(params, values)),
    )


def overridden(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a params.yaml with some values replaced by dotted key, whole sections too.

    >>> overridden({"a": {"b": 1, "c": 2}}, {"a.b": 3, "d": 4})
    {'a': {'b': 3, 'c': 2}, 'd': 4}
    """
    result = copy.deepcopy(dict(content))
    for key, value in overrides.items():
        *path, last = key.split(".")
        level = result
        for part in path:
            if not isinstance(level.get(part), dict):
                level[part] = {}
            level = level[part]
        level[last] = value
    return result


def new_work(runs: Iterable[PlannedRun], made: Iterable[str] = ()) -> dict[str, list[Work]]:
    """Run -> the trainings that no run before it has: what is left to do if they are done in this order.

    Args:
        runs: in that order.
        made: keys of trainings that other experiments have made.
    """
    seen = set(made)
    left = {}
    for run in runs:
        left[run.name] = [work for work in run.work if work.key not in seen]
        seen |= run.trainings
    return left


def plan_table(
    runs: Sequence[PlannedRun], done: Iterable[str], rate: float | None, jobs: int, made: Iterable[str] = ()
) -> pd.DataFrame:
    """What is printed before anything starts.

    Args:
        runs: all of them, in order.
        done: names of those that are finished.
        rate: samples per second of one training; None: not known.
        jobs: runs side by side.
        made: keys of trainings that other experiments have made.

    Returns:
        A row per run and one for all: `random_seed`, `trainings` (those that no earlier run has), `samples`, `hours`
        (of one training after another; in the last row with `jobs` side by side), `state`.
    """
    finished = set(done)
    left = new_work(sorted(runs, key=lambda run: run.name not in finished), made)
    rows: list[dict[str, Any]] = []
    for run in runs:
        work = [] if run.name in finished else left[run.name]
        rows.append(
            {
                "run": run.run,
                "random_seed": str(run.seed),
                "trainings": len(work),
                "samples": sum(each.samples for each in work),
                "state": "done" if run.name in finished else "",
            }
        )
    total = {
        "run": f"all, {jobs} side by side" if jobs > 1 else "all",
        "random_seed": "",
        "trainings": sum(row["trainings"] for row in rows),
        "samples": sum(row["samples"] for row in rows),
        "state": f"{len(finished)} of {len(runs)} done",
    }
    table = pd.DataFrame([*rows, total])
    hours = table["samples"] / rate / 3600 if rate else pd.Series(float("nan"), table.index)
    hours.iloc[-1] /= jobs
    table.insert(4, "hours", hours)
    return table


def training_plan(params: Params, role: Role, key: str | None, images: int, share: float = 1.0) -> TrainPlan:
    """Length and schedule of one of `Params.trainings`, before its pairs are known.

    Args:
        params: of the run.
        role, key: which training.
        images: of the source that the seed is trained on: samples of an epoch if `training.epoch_samples` is null.
        share: of an update, see `make_plan`; here its steps are counted from 0.

    Raises:
        ModeError: as `make_plan`.
    """
    return make_plan(
        role,
        Pairs.of(np.zeros(1, np.int64), np.zeros(1, np.int64)),
        params.training,
        images,
        key=key,
        expert=params.updates[key] if role is UPDATE and key else params.experts[key] if key is not None else None,
        experts=params.coarse_of(params.training.source) if role is DENSE_LONG else 0,
        parent=None if role is SEED else Path(SEED.name),
        share=share,
    )


def _work(params: Params, values: Mapping[str, Any]) -> Iterable[Work]:
    """The trainings of a run."""
    seed_key = {section: values.get(section) for section in _OF_SEED}
    images = params.training.epoch_samples
    for role, key in params.trainings:
        # An epoch of null is as long as there are images, which only the index knows.
        samples = training_plan(params, role, key, images).samples if images else float("nan")
        own: dict[str, Any] = {"sources": {name: values["sources"][name] for name in _sources_of(params, role, key)}}
        if role is DENSE_LONG:
            own |= {"coarse": params.coarse_of(params.training.source)}
        elif key is not None:
            # An update goes on from another model, which its own name may be but the last link to.
            own |= {"key": key, "expert": values["experts"] if role is UPDATE else values["experts"][key]}
            own |= {"updates": values["updates"]} if role is UPDATE else {}
            own |= {} if role is FULL else {section: values.get(section) for section in _OF_EXPERT}
        yield Work(role.model(key), _digest({"role": role.name, **seed_key, **own}), samples)


def _sources_of(params: Params, role: Role, key: str | None) -> set[str]:
    """The sources that a training is made of: of its pairs, of the seed's, and of those that tell its cluster."""
    sources = {params.training.source}
    if key is not None and role is not FULL:
        sources |= {*params.sources_of(key)} | ({source} if (source := params.embedding.fit_on) else set())
    return sources


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
