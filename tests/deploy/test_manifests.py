"""What deploy/ holds: for containers valid, without root, and with the names that the project uses."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from mode.params import MachineParams

DEPLOY = Path(__file__).parents[2] / "deploy"
EXPERT = DEPLOY / "kubernetes" / "expert.yaml"
CONTAINERFILE = (DEPLOY / "Containerfile").read_text()


@pytest.fixture
def job() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(EXPERT.read_text())
    return content


def test_the_job_is_one_by_kubernetes_schema(job: dict[str, Any]) -> None:
    kubernetes_validate.validate(job, "1.30", strict=True)
    job["spec"]["backoffLimits"] = 2  # a field that is none
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.30", strict=True)


def test_the_job_has_no_root_and_time_for_a_checkpoint(job: dict[str, Any]) -> None:
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["terminationGracePeriodSeconds"] >= 60  # as long as several processes are given
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_job_trains_on_as_many_gpus_as_it_has(job: dict[str, Any]) -> None:
    [container] = job["spec"]["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    resources = container["resources"]
    gpus = resources["limits"]["nvidia.com/gpu"]
    assert gpus == resources["requests"]["nvidia.com/gpu"] == int(variables["MODE_PROCESSES"]) > 1
    assert resources["requests"]["memory"] == resources["limits"]["memory"]
    assert container["args"] == ["stage", "expert", job["metadata"]["labels"]["expert"]]
    assert {name.removeprefix("MODE_").lower() for name in variables} <= set(MachineParams.model_fields)


def test_the_image_is_of_a_tag_and_of_the_lock_and_without_root(job: dict[str, Any]) -> None:
    bases = re.findall(r"^FROM (\S+)", CONTAINERFILE, re.MULTILINE)
    assert bases
    assert all(re.fullmatch(r"[a-z0-9./-]+:3\.\d+\.\d+-[a-z-]+", base) for base in bases)
    installs = re.findall(r"pip install (.*)", CONTAINERFILE)
    assert len(installs) == 3
    assert all("--require-hashes" in line or "--no-deps" in line for line in installs)
    [user] = re.findall(r"^USER (.*)$", CONTAINERFILE, re.MULTILINE)
    pod = job["spec"]["template"]["spec"]["securityContext"]
    assert user == f"{pod['runAsUser']}:{pod['runAsGroup']}"
    assert not user.startswith("0:")
    assert re.findall(r"useradd --uid (\d+)", CONTAINERFILE) == [user.partition(":")[0]]


def test_all_that_the_image_is_made_of_is_here() -> None:
    root = DEPLOY.parent
    lines = re.findall(r"^COPY (?!--from)(.*)$", CONTAINERFILE, re.MULTILINE)
    copied = [name for line in lines for name in line.split()[:-1]]
    assert [name for name in copied if not (root / name).exists()] == []
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    # Each is a file or folder, or lies in a folder, that is copied.
    assert [
        name for name in wheel["force-include"] if not any(f"{name}/".startswith(f"{each}/") for each in copied)
    ] == []


@pytest.mark.parametrize(("number", "said"), [({}, "none"), ({"SLURM_ARRAY_TASK_ID": "2"}, "2")])
def test_a_job_for_no_expert_is_one_line(tmp_path: Path, number: dict[str, str], said: str) -> None:
    """Without `--array`, or with a number too many."""
    command = ["bash", str(DEPLOY / "slurm" / "experts.sbatch"), "expert-0", "expert-1"]
    environment = {"PATH": os.environ["PATH"], **number}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: --array has number {said}, but there are 2 experts (from 0 on)\n"
