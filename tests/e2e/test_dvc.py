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
    new_project.run("dvc", "repro", "names")  # `--single-item` leaves it out
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


def test_all_stages_with_a_name_in_their_outputs_wait_for_the_names() -> None:
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    assert next(iter(stages)) == "names"
    for name, stage in stages.items():
        described = stage.get("do", stage)
        interpolated = "${" in str([described.get(kind) for kind in ("outs", "metrics", "plots", "wdir")])
        assert not interpolated or "data/names.txt" in described["deps"], name


#: Where a name leads to that is none, what is called so, and the stages that DVC makes of it.
ELSEWHERE = {
    "../docs": ("experts", "expert"),
    "../../elsewhere": ("experts", "expert"),
    "../../docs": ("sources", "index"),
    "../../../elsewhere": ("generated", "data"),
    "../elsewhere": ("experts in watch.yaml", "expert"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_name_that_leads_elsewhere_costs_no_folder(new_project: SmallProject, name: str) -> None:
    where, stage = ELSEWHERE[name]
    for folder in (new_project.root / "docs", new_project.root / "elsewhere", new_project.root.parent / "elsewhere"):
        folder.mkdir()
        (folder / "dear.txt").write_text("to somebody")
    content, watch = new_project.params(), yaml.safe_load((new_project.root / "watch.yaml").read_text())
    if where in content:
        content[where][name] = {"source": "base", "cluster": 1} if where == "experts" else {"shards": "glyphs"}
    elif where in watch:
        watch[where].append(name)
    else:
        watch["experts"] = {name: {"source": "base", "cluster": 1}}
    new_project.set_params(content)
    (new_project.root / "watch.yaml").write_text(yaml.safe_dump(watch))
    forge_lock(new_project)

    before = all_files(new_project.root.parent)
    for targets in ([f"{stage}@{name}"], []):
        done = new_project.run("dvc", "repro", *targets, check=False)
        assert done.returncode != 0
        # Of a source DVC says itself that a stage would read what it writes, or that two would write the same.
        by_dvc = ("ERROR: Same item(s) are defined as both", "ERROR: output ")
        said = by_dvc if where == "sources" else ("error: params.yaml: ", "error: watch.yaml: ")
        assert len([line for line in done.stderr.splitlines() if line.startswith(said)]) == 1, done.stderr
        assert all_files(new_project.root.parent) == before


def forge_lock(project: SmallProject) -> None:
    """A dvc.lock, and the file, of which DVC would believe that the names of somebody's project had been checked."""
    names = project.root / "data/names.txt"
    names.parent.mkdir()
    names.write_text("Every source and expert has a name.\n")
    project.run("dvc", "commit", "--force", "names")
    assert "names" in yaml.safe_load((project.root / "dvc.lock").read_text())["stages"]


def all_files(root: Path) -> set[str]:
    """Paths of all files that are not DVC's or git's own, but for the one that says that names were checked."""
    paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {str(path) for path in paths if not {".dvc", ".git", ".mode", "__pycache__"} & {*path.parts}} - {
        "project/data/names.txt"
    }
