"""Two schedulers on one project, one of them a terminal: nothing runs twice, and one line says who waits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.flows.conftest import ToyProject, terminal
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e

STAGE = "expert@expert-0"


def dvc(project: ToyProject, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=project.root,
        env=terminal(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_stage_that_runs_is_begun_by_nobody_else(tmp_path: Path) -> None:
    """Not by another `dvc repro`, nor by the command that is a flow's task; another stage is."""
    project = ToyProject(tmp_path / "project")
    project.create()
    project.fresh(held=("expert-0",))
    project.dvc("repro", "--quiet", "seed")
    first = dvc(project, "repro", "--single-item", STAGE)
    wait_until(lambda: project.events("start", "expert-0"), lambda: first.poll())
    for options in ([], ["--wait-for-lock"]):
        second = dvc(project, *options, "repro", "--single-item", STAGE)
        output, _ = second.communicate()
        assert second.returncode != 0
        assert len([line for line in output.splitlines() if line.startswith("ERROR: ")]) == 1
        assert "is busy, it is being blocked by" in output, output
        assert str(first.pid) in output
        assert "Traceback" not in output
    project.dvc("repro", "--quiet", "--single-item", "expert@expert-1")
    project.release()
    output, _ = first.communicate()
    assert first.returncode == 0, output
    assert len(project.events("start", "expert-0")) == len(project.events("end", "expert-0")) == 1
