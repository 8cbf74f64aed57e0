"""Runs of an experiment: what DVC is told, and what is printed and kept. tests/e2e makes real ones."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from flows.clones import code_of, head_of
from flows.devices import Place
from flows.locks import take
from flows.overrides import set_params
from flows.runs import Runner, folders, main, own_parameters, parser, runs_side_by_side, show_plan, with_starts
from mode.errors import ModeError
from mode.experiments.definition import Experiment
from mode.experiments.findings import figures_of_runs
from mode.experiments.plan import PlannedRun, overridden, plan_runs
from mode.experiments.table import SCHEMA, load_table, save_table
from mode.paths import Paths

REPOSITORY = Path(__file__).parents[2]
CONTENT: dict[str, Any] = yaml.safe_load((REPOSITORY / "params.yaml").read_text())


@pytest.mark.parametrize(
    "overrides",
    [
        {"clustering.coarse": 2, "training.lr": 0.5, "image.flip": True, "glyphs.per_family": None},
        {"experts": {"expert-0": {"source": "base", "cluster": 0, "epochs": 3}}, "full": ["expert-0"], "new": []},
        {"sources.base.shards": {"/a b/c(1)": 1.0, "/data/{0..9}.tar": 0.5, "/x:y,z=w\\": 2.0}},
        {"training.adapter": {"rank": 4}, "model": {}, "model.name": "ViT-B-32"},
        {"x": "a, {b} [c] \"d\" 'e' $f: \\ #"},
        {"x": 'quote after a backslash \\"'},
        {"x": "ends with a backslash\\"},
        {"x": "two\nlines", "y": "é", "z": "1", "u": "null", "v": "{photos}"},
    ],
)
def test_dvc_reads_back_what_it_is_told(tmp_path: Path, overrides: dict[str, Any]) -> None:
    path = tmp_path / "params.yaml"
    shutil.copy(REPOSITORY / "params.yaml", path)
    apply_overrides(path, set_params(overrides)[1::2])
    assert yaml.safe_load(path.read_text()) == overridden(CONTENT, overrides)


@pytest.mark.parametrize("value", ["${x}", 1e-06, math.inf, {"é": 1}, {"~a": 1}, [{"a": 1e-7}], date(2026, 1, 1), b"x"])
def test_what_dvc_cannot_be_told_is_one_line(value: object) -> None:
    with pytest.raises(ModeError, match=r"^a\.b: [^\n]* cannot be passed on to DVC"):
        set_params({"a.b": value})


@pytest.mark.parametrize("key", ["", "a..b", "a=1,b", "a b", "a.[0]", "~a", "a\nb"])
def test_keys_that_dvc_cannot_be_told_are_refused(key: str) -> None:
    with pytest.raises(ModeError, match="cannot be passed on to DVC as a key"):
        set_params({key: 1})


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    assert folders([f"photos={tmp_path}/a=b"]) == {"photos": tmp_path / "a=b"}
    for wrong in ("photos", f"photos={tmp_path}/none", "photos="):
        with pytest.raises(ModeError, match="no folder"):
            folders([wrong])


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


def test_the_plan_as_text() -> None:
    made = Experiment.model_validate({"title": "t", "question": "q", "runs": {"a": {}, "b": {}}, "rows": {}})
    shown = show_plan(plan_runs("x", made, CONTENT, {}, [0]), [], None, 2)
    assert "all, 2 side by side" in shown
    assert "0 of 2 done" in shown
    assert shown.endswith("the first finished run will tell how long; stages in common are made once")


def made_of(**runs: Any) -> Experiment:
    return Experiment.model_validate({"title": "t", "question": "q", "runs": runs, "rows": {}})


def test_what_is_chosen_has_what_it_starts_from() -> None:
    made = made_of(a={}, b={"starts_from": ["a", "dense"]}, c={"starts_from": ["b", "dense"]}, d={})
    assert with_starts(made, ["c"]) == {"a", "b", "c"}
    assert with_starts(made, ["d"]) == {"d"}


@pytest.mark.parametrize(
    "arguments", [["--seeds", "-1"], ["--seeds", "x"], ["--seeds", "4294967296"], ["--jobs", "0"], ["--jobs", "-1"]]
)
def test_numbers_that_are_none_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["table5", *arguments])
    assert f"{arguments[1]} is no whole number from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "jobs", "devices"),
    [
        ("", 3, ["cpu", "cpu", "cpu"]),
        ("0,1", None, ["cuda:0", "cuda:1"]),
        ("0,1", 1, ["cuda:0"]),
        ("0,1", 3, ["cuda:0", "cuda:1", "cuda:0"]),
        ("0", 12, ["cuda:0"] * 12),
    ],
)
def test_more_runs_than_gpus_share_them(
    gpus: str, jobs: int | None, devices: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    places = runs_side_by_side(jobs, tmp_path)
    assert [place.device for place in places] == devices
    assert len({place.locks for place in places}) == len(places)


def test_a_name_is_no_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(REPOSITORY)
    for name in ("../params", "results/../table5", "/etc/passwd", "..", "nothing"):
        assert main([name, "--plan"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=x", "-c", "user.email=x@localhost")
    return subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def test_runs_are_of_a_commit_of_the_project_itself(tmp_path: Path) -> None:
    with pytest.raises(ModeError, match=r"^git rev-parse failed in [^\n]*not a git repository"):
        head_of(tmp_path)
    git(tmp_path, "init", "--quiet")
    with pytest.raises(ModeError, match="no commit yet"):
        head_of(tmp_path)
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message=x")
    assert head_of(tmp_path) == git(tmp_path, "rev-parse", "HEAD").strip()
    (tmp_path / "part").mkdir()
    with pytest.raises(ModeError, match=r"part: is a part of the git repository"):
        head_of(tmp_path / "part")


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
        return Runner(tmp_path, "x", made, runs, runs, quick=False, keep=False).made()

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
    runner = Runner(tmp_path, "x", made, runs, runs, quick=False, keep=False)
    assert (runner.made(), runner.rate(), runner.is_done(run)) == (set(), None, False)
    runner.files(run).folder.mkdir(parents=True)
    for content in (b"", b"{}", b"[1]", b"\xff", 5000 * b"["):
        runner.files(run).trainings.write_bytes(content)
        with pytest.raises(ModeError, match=r"trainings\.json: damaged \(remove [^\n]*$"):
            runner.made()
    runner.files(run).rows.write_bytes(b"PAR1")
    with pytest.raises(ModeError, match=r"rows\.parquet: no table of results: [^\n]*$"):
        runner.rate()


def test_long_trainings_say_how_fast_it_is_and_variants_are_none(tmp_path: Path) -> None:
    made = made_of(a={})
    [run] = runs = plan_runs("x", made, CONTENT, {}, [0])
    runner = Runner(tmp_path, "x", made, runs, runs, quick=False, keep=False)
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
    save_table(pd.DataFrame(rows, columns=SCHEMA.names), runner.files(run).rows)
    assert runner.rate() == 100.0


def test_it_says_once_what_runs_wait_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = made_of(a={})
    runs = plan_runs("x", made, CONTENT, {}, [0])
    runner = Runner(tmp_path, "x", made, runs, runs, quick=False, keep=False)
    places = [Place("cpu", (tmp_path / name,), {}) for name in ("cpu-0", "cpu-1")]
    runner._say_who_is_before(runs, places)
    assert not capsys.readouterr().out
    locks = [take(place.locks[0], f"other-{number}, process 7") for number, place in enumerate(places)]
    for _ in range(2):
        runner._say_who_is_before(runs, places)
    assert capsys.readouterr().out == "waiting for other-0, process 7, other-1, process 7\n"
    assert all(locks)


def test_a_run_that_another_process_makes_is_waited_for(tmp_path: Path) -> None:
    made = made_of(a={})
    [run] = runs = plan_runs("x", made, CONTENT, {}, [0])
    runner = Runner(tmp_path, "x", made, runs, runs, quick=False, keep=False)
    assert runner._next(runs, []) is run
    lock = take(runner.files(run).lock, "another experiment")
    assert lock is not None
    assert runner._next(runs, []) is None
    lock.close()
    assert runner._next(runs, []) is run


def rows_of(run: PlannedRun, value: float) -> pd.DataFrame:
    row = ("x", run.run, run.seed, "dense", "one", "acc1", value, 1.0, 1.0, 1.0, 1.0, "c0ffee", "cpu")
    return pd.DataFrame([row], columns=SCHEMA.names)


def test_runs_that_the_results_have_are_not_made_again_and_stay_in_them(tmp_path: Path) -> None:
    made = made_of(a={}, b={}, c={"set": {"training.lr": 0.1}})
    paths = Paths(tmp_path)
    runs = plan_runs("x", made, CONTENT, {}, [0, 1])

    def runner(anew: bool = False) -> Runner:
        known = figures_of_runs(paths.experiment_results, "x")
        return Runner(tmp_path, "x", made, runs, runs, quick=False, keep=False, known=known, anew=anew)

    def names(of: Runner) -> list[str]:
        return [run.name for run in runs if of.is_done(run)]

    save_table(rows_of(runs[0], 0.25), runner().files(runs[0]).rows)
    runner().collect()
    shutil.rmtree(paths.experiment_runs)  # another machine, which has what is committed
    assert names(runner()) == ["x-a-0", "x-b-0"]  # they are one run by two names
    assert names(runner(anew=True)) == []

    save_table(rows_of(runs[2], 0.5), runner().files(runs[2]).rows)
    for each in (runner(), runner(anew=True)):
        each.collect()
        found = load_table(paths.experiment_table("x", quick=False))
        assert found[["run", "random_seed", "value"]].values.tolist() == [["a", 0, 0.25], ["b", 0, 0.25], ["c", 0, 0.5]]
    assert names(runner(anew=True)) == ["x-c-0"]

    save_table(rows_of(runs[0], 0.75), runner().files(runs[0]).rows)  # made here after all
    runner(anew=True).collect()
    assert load_table(paths.experiment_table("x", quick=False))["value"].tolist() == [0.75, 0.75, 0.5]


def test_a_model_is_kept_for_the_runs_that_are_not_known(tmp_path: Path) -> None:
    made = made_of(a={}, b={"starts_from": ["a", "dense"]}, c={"starts_from": ["a", "expert-1"]})
    runs = plan_runs("x", made, CONTENT, {}, [0])
    known = {run.identity: rows_of(run, 0.5) for run in runs[:2]}
    runner = Runner(tmp_path, "x", made, runs, runs, quick=False, keep=False, known=known)
    assert runner.models_to_keep(runs[0]) == {"expert-1"}
    assert [runner.is_done(run) for run in runs] == [False, True, False]
    runner.files(runs[0]).kept("expert-1").mkdir(parents=True)
    assert [runner.is_done(run) for run in runs] == [True, True, False]
