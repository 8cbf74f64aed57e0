"""`mode experiment` on a small project: real clones, DVC, one cache, MLflow; interrupted, failing, done already."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from mode.experiments.plan import arms_of
from mode.experiments.table import load_table
from mode.params import load_params
from mode.tracking.store import database_uri
from tests.e2e.conftest import REPOSITORY, SmallProject, make_project, take_cache
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e

#: `published` shares all trainings with `mode`; `broken` has more fine clusters than pairs.
TINY = {
    "title": "Two ways of routing",
    "question": "Does it run?",
    "seeds": [0],
    "variants": ["top-1"],
    "runs": {
        "mode": None,
        "published": {"set": {"routing.kind": "published"}},
        "broken": {"set": {"clustering.fine": 100_000}},
    },
    "rows": {"MoDE": ["mode", "ensemble"], "published": ["published", "ensemble"]},
}


@pytest.fixture(scope="module")
def project(finished_project: SmallProject, tmp_path_factory: pytest.TempPathFactory) -> SmallProject:
    """A project under git, all of it committed, with an experiment of three runs.

    DVC has all but one expert in its cache, and what is always made anew.
    """
    made = make_project(tmp_path_factory.mktemp("experiments") / "project")
    take_cache(finished_project, made, but={"models/expert-0"})
    shutil.copytree(REPOSITORY / "flows", made.root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    (made.root / "experiments").mkdir()
    (made.root / "experiments/tiny.yaml").write_text(yaml.safe_dump(TINY))
    commit(made)
    return made


def commit(project: SmallProject) -> None:
    project.run("git", "add", "--all")
    project.run("git", "-c", "user.name=x", "-c", "user.email=x@localhost", "commit", "--quiet", "--message=x")


def experiment(project: SmallProject, *arguments: str) -> subprocess.CompletedProcess[str]:
    return project.run("mode", "experiment", "tiny", "--jobs", "1", *arguments, check=False)


def test_an_interrupted_run_goes_on_and_a_second_takes_what_they_share(project: SmallProject) -> None:
    process = project.start(sys.executable, "-m", "flows.runs", "tiny", "--jobs", "1", "--runs", "mode", "published")
    runs = project.root / ".mode/experiments"
    wait_until(lambda: list(runs.glob("*/project/checkpoints/expert-0/*")) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130, said
    assert "the same command goes on from here" in said
    assert not (project.root / "experiments/results").exists()

    done = experiment(project, "--runs", "mode", "published", "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    table = load_table(project.root / "experiments/results/tiny.parquet")
    assert set(table["run"]) == {"mode", "published"}
    params = load_params(project.root / "params.yaml")
    assert set(table["arm"]) == {*arms_of(params), "top-1"}
    assert table["commit"].unique().tolist() == [project.run("git", "rev-parse", "HEAD").stdout.strip()]
    assert table.groupby("arm")["models"].first().to_dict().items() >= {"dense": 1, "ensemble": 2, "top-1": 1}.items()
    # One training of each model for both, from DVC's cache: the same figures to the last digit.
    shared = table[~table["arm"].isin(["ensemble", "top-1"])]
    assert (shared.groupby(["arm", "task"])["value"].nunique() == 1).all()
    logs = [path.read_text() for path in runs.glob("*/log")]
    assert sum("Running stage 'expert@expert-0'" in text for text in logs) == 1
    assert sum("Stage 'expert@expert-0' is cached" in text for text in logs) == 1


def test_dvc_and_mlflow_list_the_same_runs(project: SmallProject) -> None:
    names = {"tiny-mode-0", "tiny-published-0"}
    listed = project.run("dvc", "exp", "list", "--all-commits", "--name-only").stdout
    assert names <= set(listed.split())
    client = MlflowClient(database_uri(project.root / "mlruns"))
    [found] = client.search_experiments(filter_string="name = 'experiments'")
    runs = client.search_runs([found.experiment_id])
    assert {run.info.run_name for run in runs} == names
    table = load_table(project.root / "experiments/results/tiny.parquet")
    means = table[table["metric"] == "acc1"].groupby(["run", "arm"])["value"].mean()
    for run in runs:
        assert run.data.metrics["ensemble/zeroshot/mean"] == pytest.approx(means[run.data.tags["run"], "ensemble"])
        assert run.data.tags["random_seed"] == "0"


def test_a_run_that_fails_stops_no_other_and_what_is_done_is_not_made_again(project: SmallProject) -> None:
    before = (project.root / "experiments/results/tiny.parquet").read_bytes()
    done = experiment(project)
    assert done.returncode == 1
    assert "2 of 3 done" in done.stdout
    [line] = [line for line in done.stderr.splitlines() if line.startswith("failed")]
    assert "tiny-broken-0" in line
    assert "log" in line
    assert "started" not in "".join(line for line in done.stdout.splitlines() if "mode seed 0" in line)
    assert (project.root / "experiments/results/tiny.parquet").read_bytes() == before


def test_a_run_whose_figures_were_not_taken_over_is_taken_over_the_next_time(project: SmallProject) -> None:
    before = (project.root / "experiments/results/tiny.parquet").read_bytes()
    runs = project.root / ".mode/experiments"
    [rows] = [path for path in runs.glob("*/rows.parquet") if set(load_table(path)["run"]) == {"mode"}]
    rows.unlink()  # its clone is still there, in which DVC has the experiment
    assert (rows.parent / "project/reports/metrics.json").is_file()
    done = experiment(project, "--runs", "mode", "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project.root / "experiments/results/tiny.parquet").read_bytes() == before


def test_runs_are_of_a_commit(project: SmallProject, tmp_path: Path) -> None:
    params = (project.root / "params.yaml").read_text()
    try:
        (project.root / "params.yaml").write_text(params.replace("random_seed: 0", "random_seed: 7"))
        refused = experiment(project)
        assert refused.returncode == 1
        assert refused.stderr == (
            "error: uncommitted changes in src, dvc.yaml or params.yaml (commit them: runs are of a commit)\n"
        )
    finally:
        (project.root / "params.yaml").write_text(params)
    elsewhere = subprocess.run(
        [sys.executable, "-m", "flows.runs", "tiny"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(project.root), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert elsewhere.stderr == f"error: {tmp_path}: no dvc.yaml (run it in the project's folder)\n"
