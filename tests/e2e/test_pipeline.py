"""The whole pipeline, run by the real DVC with real trainings of a very small model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.e2e.conftest import SmallProject, environment

pytestmark = pytest.mark.e2e

MODELS = ["seed", "dense", "dense-long", "expert-0", "expert-1"]


def test_one_command_gives_models_and_their_figures(finished_project: SmallProject) -> None:
    root = finished_project.root
    metrics = json.loads((root / "reports/metrics.json").read_text())
    assert set(metrics["zeroshot"]["mean"]) == {*MODELS, "uniform", "ensemble"}
    for task, figures in metrics["zeroshot"]["tasks"].items():
        assert set(figures) == {*MODELS, "uniform", "ensemble"}, task
        assert all(0 <= value <= 1 for value in figures.values())
        assert sum(metrics["routing"][task].values()) == pytest.approx(1)
    cost = metrics["cost"]
    # Three epochs of 320 samples, two more for the dense model and each expert, four for the long one.
    assert [cost[name]["samples_seen"] for name in MODELS] == [960, 1600, 2240, 1600, 1600]
    assert cost["ensemble"]["samples_seen"] == cost["dense-long"]["samples_seen"] == 2240
    assert (root / "reports/index.html").is_file()


def test_a_second_run_has_nothing_to_do_and_says_so(finished_project: SmallProject) -> None:
    printed = finished_project.run("dvc", "repro").stdout
    assert [line for line in printed.splitlines() if line.startswith("Running stage")] == ["Running stage 'names':"]
    assert "Stage 'report' didn't change, skipping" in printed


def test_metrics_and_plots_are_known_to_dvc(finished_project: SmallProject) -> None:
    shown = json.loads(finished_project.run("dvc", "metrics", "show", "--json").stdout)
    summary = shown[""]["data"]["reports/summary.json"]["data"]
    metrics = json.loads((finished_project.root / "reports/metrics.json").read_text())
    assert summary["zeroshot"]["ensemble"] == pytest.approx(metrics["zeroshot"]["mean"]["ensemble"], abs=1e-6)
    finished_project.run("dvc", "plots", "show", "--out", "plots-page")
    page = (finished_project.root / "plots-page/index.html").read_text()
    for name in ("accuracy", "tasks", "routing", "training"):
        assert f"reports_plots_{name}_csv" in page


def test_any_task_folders_can_be_evaluated_by_themselves(finished_project: SmallProject, tmp_path: Path) -> None:
    written = tmp_path / "figures.json"
    command = ["mode", "evaluate", "--tasks", "data/tasks/chess", "data/tasks/dice", "--output", str(written)]
    assert "ensemble" in finished_project.run(*command).stdout
    figures = json.loads(written.read_text())
    whole = json.loads((finished_project.root / "reports/metrics.json").read_text())
    assert set(figures["zeroshot"]["tasks"]) == {"chess", "dice"}
    for task, models in figures["zeroshot"]["tasks"].items():
        assert models == pytest.approx(whole["zeroshot"]["tasks"][task])
    failed = finished_project.run("mode", "evaluate", "--tasks", "data/index", check=False)
    assert failed.returncode == 1
    assert len(failed.stderr.strip().splitlines()) == 1


def test_mlflow_has_a_run_per_model(finished_project: SmallProject) -> None:
    database = f"sqlite:///{finished_project.root / 'mlruns/mlflow.db'}"
    client = MlflowClient(database, registry_uri=database)
    [experiment] = [found for found in client.search_experiments() if found.name == "mode"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {*MODELS, "uniform", "ensemble"}
    assert {name: run.data.tags["role"] for name, run in runs.items()} == {
        "seed": "seed",
        "dense": "dense",
        "dense-long": "dense",
        "expert-0": "expert",
        "expert-1": "expert",
        "uniform": "ensemble",
        "ensemble": "ensemble",
    }
    metrics = json.loads((finished_project.root / "reports/metrics.json").read_text())
    for name, run in runs.items():
        assert run.data.metrics["zeroshot/mean"] == pytest.approx(metrics["zeroshot"]["mean"][name])
        assert run.data.metrics["cost/samples_seen"] == metrics["cost"][name]["samples_seen"]
    for name in MODELS:
        assert len(client.get_metric_history(runs[name].info.run_id, "train/loss")) >= 1
    assert client.get_model_version_by_alias("mode-ensemble", "champion").run_id == runs["ensemble"].info.run_id


def test_a_changed_expert_reruns_that_expert_and_what_follows(finished_project: SmallProject) -> None:
    before = finished_project.params()
    changed = finished_project.params()
    changed["experts"]["expert-1"]["lr"] = 0.001
    finished_project.set_params(changed)
    try:
        assert finished_project.stages_to_run() == {"expert@expert-1", "ensemble", "evaluate", "variants", "report"}
    finally:
        finished_project.set_params(before)
    assert finished_project.stages_to_run() == set()


def test_a_changed_shard_elsewhere_is_noticed(
    finished_project: SmallProject, new_project: SmallProject, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(finished_project.root / "data/shards/base", elsewhere)
    (elsewhere / "manifest.json").unlink()
    params = new_project.params()
    params["sources"]["base"]["shards"] = str(elsewhere)
    new_project.set_params(params)
    first = new_project.run("dvc", "repro", "index@base").stdout
    assert "Running stage 'index@base'" in first
    again = new_project.run("dvc", "repro", "index@base").stdout
    assert "Stage 'index@base' didn't change" in again

    (elsewhere / "00002.tar").unlink()
    changed = new_project.run("dvc", "repro", "index@base").stdout
    assert "Running stage 'index@base'" in changed
    assert "1,000 pairs" in changed


def test_a_source_entered_by_hand_is_made_at_the_second_go(new_project: SmallProject) -> None:
    """DVC reads which stages there are before any of them can run."""
    params = new_project.params()
    params["sources"]["later"] = {"shards": "glyphs", "families": {"*": 0, "dice": 6, "chess": 4}, "coarse": 1}
    new_project.set_params(params)
    first = new_project.run("dvc", "repro", check=False)
    assert first.returncode != 0
    assert "the same command once more goes on" in first.stdout + first.stderr
    new_project.run("dvc", "repro", "assign@later")
    assert (new_project.root / "data/assignment/later.parquet").is_file()


def test_dvc_finds_mode_in_an_environment_that_is_not_activated(finished_project: SmallProject) -> None:
    """As `.venv/bin/dvc repro` right after an install."""
    root, command = (
        finished_project.root,
        [sys.executable, "-m", "dvc", "repro", "--force", "--single-item", "assign@base"],
    )
    plain = {**environment(), "PATH": "/usr/bin:/bin"}
    assert subprocess.run(command, cwd=root, env=plain, capture_output=True, check=False).returncode != 0
    (root / ".venv").symlink_to(sys.prefix)
    try:
        done = subprocess.run(command, cwd=root, env=plain, capture_output=True, text=True, check=False)
    finally:
        (root / ".venv").unlink()
    assert done.returncode == 0, done.stdout + done.stderr
