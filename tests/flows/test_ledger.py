"""What is known of the runs of an experiment. tests/e2e makes real ones."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from flows.clones import code_of
from flows.ledger import Ledger, own_parameters
from mode.errors import ModeError
from mode.experiments.definition import Experiment
from mode.experiments.findings import figures_of_runs
from mode.experiments.plan import PlannedRun, plan_runs
from mode.experiments.table import SCHEMA, load_table, save_table
from mode.paths import Paths
from tests.flows.definitions import CONTENT, made_of
from tests.flows.test_clones import git


def test_committed_parameters_name_folders_and_models_and_not_where_they_lie() -> None:
    runs = {
        "first": {"set": {"sources.base.shards": {"{photos}/train": 1.0}}},
        "second": {"starts_from": ["first", "dense"], "set": {"training.epochs": 4}},
    }
    made = Experiment.model_validate(
        {"title": "t", "question": "q", "data": {"photos": "photographs"}, "runs": runs, "rows": {}}
    )
    assert own_parameters(made, "first") == {"sources.base.shards": {"{photos}/train": 1.0}}
    assert own_parameters(made, "second") == {
        "seed": {"from": "pretrained", "name": "local-dir:first/dense"},
        "model": {},
        "image": {},
        "training.seed_epochs": 0,
        "training.epochs": 4,
    }


def test_trainings_count_as_made_by_the_same_code_alone(tmp_path: Path) -> None:
    """Else two runs at once would each make what both have in common, as the cache has it of other code only."""
    stages = {
        "seed": {"cmd": "true", "deps": ["${seed_from}", "src/loop", "data/index"]},
        "expert": {"foreach": ["a"], "do": {"cmd": "true", "deps": ["models/seed", "src/loop", "src/clusters.py"]}},
        "evaluate": {"cmd": "true", "deps": ["src/evaluation.py"]},
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / "src/loop").mkdir(parents=True)
    for name in ("loop/step.py", "clusters.py", "evaluation.py"):
        (tmp_path / "src" / name).write_text("first")
    git(tmp_path, "init", "--quiet")

    def committed() -> str:
        git(tmp_path, "add", "src", "dvc.yaml")
        git(tmp_path, "commit", "--quiet", "--message=x")
        return code_of(tmp_path, "HEAD", {"seed", "expert", "dense"})

    def found() -> set[str]:
        return Ledger(tmp_path, "x", made, runs).made()

    first = committed()
    made = made_of(a={})
    [run] = runs = plan_runs("x", made, CONTENT, {}, [0])
    trainings = Paths(tmp_path).experiment_run(run.key).trainings
    trainings.parent.mkdir(parents=True)
    trainings.write_text(json.dumps({"code": first, "trainings": ["k"]}))
    assert found() == {"k"}
    (tmp_path / "src/evaluation.py").write_text("second")
    assert (committed(), found()) == (first, {"k"})
    for name in ("loop/step.py", "clusters.py"):
        (tmp_path / "src" / name).write_text("second")
        assert committed() != first
        assert found() == set()
    trainings.write_text('["k"]')  # by a version that did not note the code
    assert found() == set()


def test_damaged_records_of_runs_are_one_line(tmp_path: Path) -> None:
    made = made_of(a={})
    [run] = runs = plan_runs("x", made, CONTENT, {}, [0])
    ledger = Ledger(tmp_path, "x", made, runs)
    assert (ledger.made(), ledger.rate(), ledger.is_done(run)) == (set(), None, False)
    ledger.files(run).folder.mkdir(parents=True)
    for content in (b"", b"{}", b"[1]", b"\xff", 5000 * b"["):
        ledger.files(run).trainings.write_bytes(content)
        with pytest.raises(ModeError, match=r"trainings\.json: damaged \(remove [^\n]*$"):
            ledger.made()
    ledger.files(run).rows.write_bytes(b"PAR1")
    with pytest.raises(ModeError, match=r"rows\.parquet: no table of results: [^\n]*$"):
        ledger.rate()


def test_long_trainings_say_how_fast_it_is_and_variants_are_none(tmp_path: Path) -> None:
    made = made_of(a={})
    [run] = runs = plan_runs("x", made, CONTENT, {}, [0])
    ledger = Ledger(tmp_path, "x", made, runs)
    rows = [
        ("x", "a", 0, arm, task, "acc1", 0.5, samples, math.nan, seconds, models, "c0ffee", "cpu")
        for arm, samples, seconds, models in (
            ("seed", 900.0, 1.0, 1.0),
            ("dense", 100.0, 9.0, 1.0),
            ("ensemble", 9e9, 1.0, 2.0),
            ("given", math.nan, math.nan, 1.0),
        )
        for task in ("one", "two")
    ]
    save_table(pd.DataFrame(rows, columns=SCHEMA.names), ledger.files(run).rows)
    assert ledger.rate() == 100.0


def rows_of(run: PlannedRun, value: float) -> pd.DataFrame:
    row = ("x", run.run, run.seed, "dense", "one", "acc1", value, 1.0, 1.0, 1.0, 1.0, "c0ffee", "cpu")
    return pd.DataFrame([row], columns=SCHEMA.names)


def test_runs_that_the_results_have_are_not_made_again_and_stay_in_them(tmp_path: Path) -> None:
    made = made_of(a={}, b={}, c={"set": {"training.lr": 0.1}})
    paths = Paths(tmp_path)
    runs = plan_runs("x", made, CONTENT, {}, [0, 1])

    def ledger(anew: bool = False) -> Ledger:
        known = figures_of_runs(paths.experiment_results, "x")
        return Ledger(tmp_path, "x", made, runs, known=known, anew=anew)

    def names(of: Ledger) -> list[str]:
        return [run.name for run in runs if of.is_done(run)]

    save_table(rows_of(runs[0], 0.25), ledger().files(runs[0]).rows)
    ledger().collect()
    shutil.rmtree(paths.experiment_runs)  # another machine, which has what is committed
    assert names(ledger()) == ["x-a-0", "x-b-0"]  # they are one run by two names
    assert names(ledger(anew=True)) == []

    save_table(rows_of(runs[2], 0.5), ledger().files(runs[2]).rows)
    for each in (ledger(), ledger(anew=True)):
        each.collect()
        found = load_table(paths.experiment_table("x", quick=False))
        assert found[["run", "random_seed", "value"]].values.tolist() == [["a", 0, 0.25], ["b", 0, 0.25], ["c", 0, 0.5]]
    assert names(ledger(anew=True)) == ["x-c-0"]

    save_table(rows_of(runs[0], 0.75), ledger().files(runs[0]).rows)  # made here after all
    ledger(anew=True).collect()
    assert load_table(paths.experiment_table("x", quick=False))["value"].tolist() == [0.75, 0.75, 0.5]


def test_a_model_is_kept_for_the_runs_that_are_not_known(tmp_path: Path) -> None:
    made = made_of(a={}, b={"starts_from": ["a", "dense"]}, c={"starts_from": ["a", "expert-1"]})
    runs = plan_runs("x", made, CONTENT, {}, [0])
    known = {run.identity: rows_of(run, 0.5) for run in runs[:2]}
    ledger = Ledger(tmp_path, "x", made, runs, known=known)
    assert ledger.models_to_keep(runs[0]) == {"expert-1"}
    assert [ledger.is_done(run) for run in runs] == [False, True, False]
    ledger.files(runs[0]).kept("expert-1").mkdir(parents=True)
    assert [ledger.is_done(run) for run in runs] == [True, True, False]
