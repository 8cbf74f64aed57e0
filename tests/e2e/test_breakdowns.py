"""Breakdowns under the real DVC: trainings that are killed, a database that is locked, a disk that is full."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from mlflow import MlflowClient
from safetensors import safe_open
from safetensors.numpy import load_file

from mode.tracking.runs import Tracker
from tests.e2e.conftest import SmallProject, small_disk
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e

#: Minutes between two checkpoints, for a training that is to be met while it runs.
EVERY_STEP = 0.0001


def test_a_killed_expert_goes_on_and_ends_the_same(finished_project: SmallProject) -> None:
    weights_file = finished_project.root / "models/expert-0/open_clip_model.safetensors"
    uninterrupted = load_file(weights_file)
    with another_training(finished_project, "expert-0") as (stage, checkpoints):
        anew = (*stage, "--force", "--no-run-cache")
        dvc = finished_project.start(*anew)
        wait_for_training(dvc.pid, checkpoints).kill()
        output, _ = dvc.communicate()
        assert dvc.returncode != 0
        assert not weights_file.exists(), output
        assert steps_done(checkpoints) > 0

        assert "expert-0 goes on from its checkpoint" in finished_project.run(*anew).stdout
        assert not checkpoints.exists()
        resumed = load_file(weights_file)
        assert resumed.keys() == uninterrupted.keys()
        for name, tensor in resumed.items():
            np.testing.assert_array_equal(tensor, uninterrupted[name], err_msg=name)


def test_a_dvc_that_is_killed_takes_its_training_along(finished_project: SmallProject) -> None:
    # So many epochs that it is still at work when its dvc is killed.
    with another_training(finished_project, "expert-1", epochs=500) as (stage, checkpoints):
        dvc = finished_project.start(*stage)
        training = wait_for_training(dvc.pid, checkpoints)
        dvc.kill()
        dvc.wait()
        training.wait()
        assert steps_done(checkpoints) > 0


def test_a_locked_database_costs_a_training_no_figure(finished_project: SmallProject) -> None:
    database = finished_project.root / "mlruns/mlflow.db"
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("mode").experiment_id  # type: ignore[union-attr]

    began = int(time.time() * 1000)
    with locked(database):
        dvc = finished_project.start("dvc", "repro", "--single-item", "--force", "--no-run-cache", "expert@expert-1")
        read_until(dvc, "expert-1: 640 of 640 samples", "goes on without the database for now")
    said, _ = dvc.communicate()
    assert dvc.returncode == 0, said
    assert (finished_project.root / "models/expert-1/card.json").is_file()
    Tracker(database.parent).prepare()  # whoever opens it sends what has waited
    [run] = client.search_runs([experiment], f"attributes.run_name = 'expert-1' AND attributes.start_time >= {began}")
    assert run.info.status == "FINISHED"
    curve = (finished_project.root / "models/expert-1/curve.csv").read_text().splitlines()[1:]
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {point.step for point in history} >= {int(line.partition(",")[0]) for line in curve}


def test_a_full_disk_ends_a_training_in_one_line_and_keeps_its_checkpoint(finished_project: SmallProject) -> None:
    with another_training(finished_project, "expert-0", epochs=500) as (stage, checkpoints):
        disk = checkpoints.parent
        with small_disk(disk, megabytes=64):
            dvc = finished_project.start(*stage)
            wait_for_training(dvc.pid, checkpoints).send_signal(signal.SIGTERM)
            dvc.communicate()
            done, [path] = steps_done(checkpoints), list_of(checkpoints)
            kept = path.read_bytes()

            # Less room than a second checkpoint needs beside the first.
            free = os.statvfs(disk)
            (disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - len(kept) // 2))
            failed = finished_project.run(*stage, check=False)
            assert failed.returncode != 0
            [line] = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
            assert "No space left on device" in line
            assert str(checkpoints) in line
            assert path.read_bytes() == kept
            assert steps_done(checkpoints) == done


@contextlib.contextmanager
def another_training(project: SmallProject, expert: str, **changes: float) -> Iterator[tuple[tuple[str, ...], Path]]:
    """An expert's stage, with these parameters changed, and the folder of its checkpoints.

    It writes one after every step. At the end the project is as it was.
    """
    stage = ("dvc", "repro", "--single-item", f"expert@{expert}")
    folder, lock = project.root / "checkpoints", project.root / "dvc.lock"
    locked_before = lock.read_bytes()
    before, changed = project.params(), project.params()
    changed["experts"][expert] |= changes
    changed["machine"]["checkpoint_minutes"] = EVERY_STEP
    shutil.rmtree(folder, ignore_errors=True)
    project.set_params(changed)
    try:
        yield stage, folder / expert
    finally:
        project.set_params(before)
        shutil.rmtree(folder, ignore_errors=True)
        lock.write_bytes(locked_before)
        project.run("dvc", "checkout", "--force", f"models/{expert}")


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Hold SQLite's exclusive lock."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


def read_until(process: subprocess.Popen[str], *texts: str) -> None:
    """Read what a process says until it has said all of these."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if all(text in said for text in texts):
            return
    raise AssertionError(said)


def wait_for_training(dvc: int, checkpoints: Path) -> psutil.Process:
    """The stage's process, as soon as it has left a checkpoint."""
    found: list[psutil.Process] = []

    def look() -> list[psutil.Process]:
        for child in psutil.Process(dvc).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # dvc also starts git, which is gone in a moment
                if {"mode", "stage"} <= {Path(word).name for word in child.cmdline()} and list_of(checkpoints):
                    found.append(child)
        return found

    wait_until(look)
    return found[0]


def list_of(checkpoints: Path) -> list[Path]:
    """Checkpoint files that are whole: one that is being written lies a folder deeper."""
    return list(checkpoints.glob("*/checkpoint.safetensors"))


def steps_done(checkpoints: Path) -> int:
    """The step that the checkpoint goes on from."""
    [path] = list_of(checkpoints)
    with safe_open(path, "numpy") as file:
        state = json.loads(file.metadata()["record"])["state"]
        return int(json.loads(state)["step"]) - 30  # three epochs of ten steps were the seed's
