"""What the real DVC does with names that are none, and where it keeps its pickles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import REPOSITORY, SmallProject

pytestmark = pytest.mark.e2e

#: Names that a shell would run.
PLANTED = (
    "x; touch planted",
    "$(touch planted)",
    "`touch planted`",
    "x\ntouch planted",
    "x' || touch planted '",
    "--help",
)


def test_no_name_is_in_a_command() -> None:
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    commands = {name: stage.get("do", stage)["cmd"] for name, stage in stages.items()}
    assert {found for command in commands.values() for found in re.findall(r"\$\{(.*?)\}", command)} == {"run"}


def test_a_planted_name_runs_nothing_and_is_one_line(new_project: SmallProject) -> None:
    content = new_project.params()
    content["sources"] |= {name: {"shards": "glyphs"} for name in PLANTED}
    new_project.set_params(content)
    watch = yaml.safe_load((new_project.root / "watch.yaml").read_text())
    (new_project.root / "watch.yaml").write_text(yaml.safe_dump(watch | {"generated": ["base", *PLANTED]}))
    targets = [f"data@{name}" for name in PLANTED]
    done = new_project.run("dvc", "repro", "--keep-going", "--single-item", *targets, check=False)
    assert done.returncode != 0
    assert not list(new_project.root.rglob("planted*"))
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(said) == len(PLANTED)
    for line in said:
        assert line.startswith("error: params.yaml: sources.x; touch planted.[key]: String should match pattern")


@pytest.mark.parametrize("where", ["", "src/mode"])
def test_dvc_keeps_its_pickles_in_the_project(new_project: SmallProject, where: str, tmp_path: Path) -> None:
    folder = new_project.root / where
    before = new_project.run("dvc", "status", "--quiet", check=False).returncode
    done = new_project.run("dvc", "--cd", str(folder), "status", "--json")
    assert "data@base" in done.stdout
    kept = [path.relative_to(new_project.root) for path in new_project.root.rglob("cache.db")]
    assert kept
    assert all(".mode" in path.parts for path in kept)
    assert new_project.run("dvc", "status", "--quiet", check=False).returncode == before
    assert ".mode" not in new_project.run("git", "status", "--porcelain", "--untracked-files=all").stdout
