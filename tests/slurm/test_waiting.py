"""What the end of a job means. Real jobs are in tests/e2e/test_slurm.py."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mode.errors import ModeError
from mode.params import MachineParams
from mode.paths import Paths
from mode.slurm.commands import ENDED, Job, environment_of_questions
from mode.slurm.waiting import STOPPED, JobCancelled, _Wait, environment_of_jobs, exit_code, run_as_job


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (Job("COMPLETED"), 0),
        (Job("FAILED", code=1), 1),
        (Job("FAILED"), 1),
        # Told to stop by Slurm, before its time limit or a preemption; killed after that.
        (Job("FAILED", code=143), None),
        (Job("FAILED", code=137), None),
        (Job("TIMEOUT"), None),
        (Job("PREEMPTED"), None),
        (Job("NODE_FAIL"), None),
        (Job("BOOT_FAIL"), None),
    ],
)
def test_a_job_that_was_stopped_goes_on_and_one_that_failed_does_not(job: Job, code: int | None) -> None:
    assert exit_code(job, "expert-0", 7) == code


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("CANCELLED", "^expert-0: job 7 was cancelled by somebody else"),
        ("OUT_OF_MEMORY", "needed more memory"),
        ("DEADLINE", "ended as DEADLINE .why"),
        ("REVOKED", "ended as REVOKED"),
    ],
)
def test_other_ends_are_one_line(state: str, message: str) -> None:
    with pytest.raises(ModeError, match=message) as raised:
        exit_code(Job(state, "why"), "expert-0", 7)
    assert raised.value.exit_code == (
        143 if state == "CANCELLED" else 1
    )  # a flow tries no stage again that ends with 143
    assert isinstance(raised.value, JobCancelled) is (state == "CANCELLED")


@pytest.mark.parametrize("state", sorted(ENDED - {"COMPLETED", "FAILED"} - STOPPED))
def test_every_other_end_is_said_of_its_job(state: str) -> None:
    with pytest.raises(ModeError, match=r"^expert-0: job 7 "):
        exit_code(Job(state), "expert-0", 7)


def test_a_job_computes_and_submits_nothing() -> None:
    given = {
        "PATH": "/bin",
        "MODE_LAUNCH": "slurm",
        "MODE_DEVICE": "cpu",
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_JOB_ID": "3",  # of a job in which a user works
        "SBATCH_ACCOUNT": "lab",
        "PREFECT_API_AUTH_STRING": "secret",
    }
    assert environment_of_jobs(given) == {
        "PATH": "/bin",
        "MODE_LAUNCH": "local",
        "MODE_DEVICE": "cpu",
        "SLURM_CONF": "/etc/slurm.conf",
        "SBATCH_ACCOUNT": "lab",
    }


@pytest.mark.parametrize(
    ("given", "cluster"),
    [
        ({}, None),
        ({"SLURM_CLUSTERS": "big"}, "big"),
        ({"SBATCH_CLUSTERS": "big"}, "big"),
        ({"SLURM_CLUSTERS": "big", "SBATCH_CLUSTERS": "small"}, "big"),  # as sbatch takes them
    ],
)
def test_a_job_is_looked_for_where_it_was_submitted(given: dict[str, str], cluster: str | None) -> None:
    assert environment_of_jobs(given).get("SBATCH_CLUSTERS") == cluster
    assert environment_of_questions(given).get("SLURM_CLUSTERS") == cluster
    assert "SLURM_CLUSTERS" not in environment_of_jobs(given)


def test_a_machine_without_slurm_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModeError, match=r"no `sbatch` here, but machine.launch is slurm"):
        run_as_job("expert-0", ["true"], MachineParams(), tmp_path)


def test_that_a_training_got_on_is_told_by_its_checkpoint_and_not_by_a_clock(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints/expert-0/abc/checkpoint.safetensors"
    path.parent.mkdir(parents=True)
    wait = _Wait("expert-0", ["true"], MachineParams(), Paths(tmp_path), Paths(tmp_path).job("expert-0"), [])
    seen = []
    for step, time in ((3, 5_000), (3, 1_400), (4, 1_400), (5, 1_400)):
        save_file({"weight": np.zeros(2)}, path, {"record": f"step {step}, with its checksum"})
        os.utime(path, (time, time))
        seen.append(wait._checkpoint())
    assert seen[0] == seen[1]
    assert seen[1] != seen[2] != seen[3]
    path.write_bytes(b"torn")
    assert wait._checkpoint() != seen[3]
