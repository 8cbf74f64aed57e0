"""What sbatch is told, and how a job's state is read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mode.params import MachineParams, SlurmParams
from mode.slurm.commands import Job, parse_job, submit_options


def options(machine: dict[str, Any]) -> set[str]:
    return set(submit_options(MachineParams.model_validate(machine), "mode-expert-0-ab12", ".mode/jobs/expert-0/log"))


ALWAYS = {
    "--requeue",
    "--job-name=mode-expert-0-ab12",
    "--output=.mode/jobs/expert-0/log",
    "--open-mode=append",
    "--ntasks-per-node=1",
}


def test_nothing_is_asked_for_that_nobody_asked_for() -> None:
    assert options({}) == ALWAYS | {
        "--nodes=1",
        "--ntasks=1",
        "--cpus-per-task=1",
        "--gpus-per-node=1",
        "--signal=TERM@120",
    }


def test_all_that_can_be_asked_for() -> None:
    slurm = {
        "partition": "gpu",
        "account": "lab",
        "qos": "low",
        "minutes": 90,
        "notice_seconds": 300,
        "memory_gb": 64,
        "gpu": "h100",
        "constraint": "nvlink",
        "resources": {"nvme": 1, "lustre:fast": 2},
    }
    asked = options({"processes": 4, "nodes": 2, "workers": 7, "slurm": slurm})
    assert asked == ALWAYS | {
        "--nodes=2",
        "--ntasks=2",
        "--cpus-per-task=32",  # each of 4 processes and its 7 workers
        "--gpus-per-node=h100:4",
        "--signal=TERM@300",
        "--partition=gpu",
        "--account=lab",
        "--qos=low",
        "--time=90",
        "--mem=64G",
        "--constraint=nvlink",
        "--gres=nvme:1,lustre:fast:2",
    }


def test_a_training_on_the_cpu_asks_for_no_gpu() -> None:
    assert options({"device": "cpu", "slurm": {"cpus": 3, "notice_seconds": 0}}) == ALWAYS | {
        "--nodes=1",
        "--ntasks=1",
        "--cpus-per-task=3",
    }


@given(st.text(), st.dictionaries(st.text(), st.integers(), max_size=2))
def test_what_is_accepted_is_one_word_of_plain_characters(name: str, resources: dict[str, int]) -> None:
    try:
        slurm = SlurmParams(partition=name, constraint=name, gpu=name, resources=resources)
    except ValidationError:
        return
    for option in submit_options(MachineParams(slurm=slurm), "job", "log"):
        assert option.startswith("--")
        assert all(each.isascii() and (each.isalnum() or each in "-._:=,@/") for each in option)
        assert option.count("=") <= 1


RUNNING = (
    "JobId=41 JobName=mode-expert-0-ab12 UserId=me(1000) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 "
    "Restarts=2 ExitCode=0:0 ReqNodeList=(null) ExcNodeList=(null) NodeList=n[1-2] NumNodes=2 "
    "Command=/a b/JobState=FAILED WorkDir=/x"
)


@pytest.mark.parametrize(
    ("line", "job"),
    [
        (RUNNING, Job("RUNNING", "", "n[1-2]", 0, 2, "mode-expert-0-ab12")),
        ("JobState=PENDING Reason=Priority NodeList=(null) ExitCode=0:0", Job("PENDING", "Priority")),
        ("JobState=FAILED Reason=NonZeroExitCode ExitCode=143:0", Job("FAILED", "NonZeroExitCode", code=143)),
        ("JobState=FAILED Reason=RaisedSignal:9 ExitCode=0:9", Job("FAILED", "RaisedSignal:9", code=137)),
        ("JobState=NODE_FAIL+COMPLETING Reason=NodeDown ExitCode=x:y", Job("NODE_FAIL", "NodeDown")),
        ("", Job("UNKNOWN")),
    ],
)
def test_a_job_is_read(line: str, job: Job) -> None:
    assert parse_job(line) == job


@pytest.mark.parametrize(
    ("reason", "hopeless"),
    [
        ("PartitionTimeLimit", True),
        ("PartitionNodeLimit", True),
        ("BadConstraints", True),
        ("InvalidQOS", True),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("AssocMaxCpuPerJobLimit", True),
        ("Priority", False),
        ("Resources", False),
        ("BeginTime", False),
        ("QOSMaxJobsPerUserLimit", False),  # others of this user end
        ("AssocGrpCpuLimit", False),
        ("", False),
    ],
)
def test_a_job_that_can_never_start_is_known_by_its_reason(reason: str, hopeless: bool) -> None:
    assert Job("PENDING", reason).hopeless is hopeless
    assert not Job("RUNNING", reason).hopeless
