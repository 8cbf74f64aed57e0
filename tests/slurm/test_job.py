"""The job script where it can do nothing. Jobs that work are in tests/e2e/test_slurm.py."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

import pytest

NAME = "mode-expert-0-ab12"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a training's jobs, of which the present one is called `NAME`."""
    made = tmp_path / "jobs"
    made.mkdir()
    (made / "name").write_text(NAME)
    return made


def run_job(folder: Path, name: str = NAME) -> subprocess.CompletedProcess[str]:
    """Run the script as the job 7, as far as it comes: a job that does its work needs Slurm's srun."""
    variables = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": name}
    with as_file(files("mode.slurm") / "job.sh") as script:
        command = ["bash", str(script), folder.name, "true"]
        return subprocess.run(
            command, cwd=folder.parent, env=os.environ | variables, capture_output=True, text=True, check=False
        )


@pytest.mark.parametrize("spoil", [Path.mkdir, Path.touch], ids=["no file", "nothing written"])
def test_a_job_that_cannot_claim_its_work_fails_with_a_line(folder: Path, spoil: Callable[[Path], None]) -> None:
    """Nobody would know which job works; and it has not done what it would say that it did."""
    spoil(folder / "claim")  # an empty file is what a full disk leaves
    done = run_job(folder)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: job 7: {folder}/claim: cannot be written on ")
    assert len(done.stderr.splitlines()) == 1
    assert not (folder / "exit").exists()


def test_a_node_that_does_not_see_the_project_fails_with_a_line(tmp_path: Path) -> None:
    done = run_job(tmp_path / "nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: job 7: {tmp_path}/nowhere: no such folder on ")


@pytest.mark.parametrize(("name", "claim"), [(NAME, "8\n"), ("mode-expert-0-other", None), (NAME, None)])
def test_a_job_whose_work_is_another_s_or_done_does_nothing(folder: Path, name: str, claim: str | None) -> None:
    if claim:
        (folder / "claim").write_text(claim)
    elif name == NAME:
        (folder / "name").unlink()
    done = run_job(folder, name)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (folder / "exit").exists()
