"""The commit that runs of an experiment are clones of."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flows.clones import head_of
from mode.errors import ModeError


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
