"""Sources and experts that come and go: whenever the command is killed, giving it again completes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mode.errors import ModeError
from mode.params import load_params
from mode.stages.project import Project
from mode.stages.sources import add_source, check_names, remove_expert
from tests.killing import KILL, end_at

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "models/expert-4").mkdir(parents=True)
    (root / "checkpoints/expert-4").mkdir(parents=True)
    for name in ("params.yaml", "watch.yaml"):
        shutil.copy(REPOSITORY / name, root)
    return root


def add(root: Path) -> None:
    add_source(root, root / "params.yaml", "more", "glyphs", experts=1, fine=None)


def remove(root: Path) -> None:
    remove_expert(root, root / "params.yaml", "expert-4")


def state(root: Path) -> tuple[str, str, list[str]]:
    folders = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_dir())
    return (root / "params.yaml").read_text(), (root / "watch.yaml").read_text(), folders


def agree(root: Path) -> bool:
    """Whether watch.yaml names the sources that params.yaml has."""
    watch = yaml.safe_load((root / "watch.yaml").read_text())
    return {*watch["generated"], *watch["watched"]} == load_params(root / "params.yaml").sources.keys()


def checked(root: Path) -> None:
    check_names(Project(root, load_params(root / "params.yaml")))


def test_names_that_dvc_sees_are_those_of_the_parameters(project: Path) -> None:
    checked(project)
    add(project)
    checked(project)
    (project / "watch.yaml").unlink()
    checked(project)


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        ("generated: [base, ../docs]", "watch.yaml: generated: '../docs' is not among base (take it out)"),
        ("watched: {../docs: 1}", "watch.yaml: watched: '../docs' is not among base (take it out)"),
        ("watched: [[base]]", "watch.yaml: watched: ['base'] is not among base (take it out)"),
        ("watched: base", "watch.yaml: watched: names are wanted, not 'base'"),
        ("watched_tasks: [../docs]", "watch.yaml: watched_tasks: '../docs' is not among tasks (take it out)"),
        ("watched_seed: [../docs]", "watch.yaml: watched_seed: '../docs' is not among seed (take it out)"),
        ("experts: {../docs: {source: base, cluster: 1}}", "watch.yaml: experts: unknown key"),
        ("1: base", "watch.yaml: 1: unknown key"),
        ("- base", "watch.yaml: keys and values are wanted, not ['base']"),
        ("{", "watch.yaml: not valid YAML"),
    ],
)
def test_other_names_in_watch_are_refused(project: Path, planted: str, message: str) -> None:
    (project / "watch.yaml").write_text(planted)
    with pytest.raises(ModeError) as caught:
        checked(project)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_names_that_only_dvc_sees_are_refused(project: Path) -> None:
    params = Project(project, load_params(project / "params.yaml"))
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("\n  expert-0:", "\n  ../docs:"))
    with pytest.raises(ModeError, match=r"params\.yaml: experts: '\.\./docs' is not among expert-0, expert-1"):
        check_names(params)


@pytest.mark.parametrize("command", [add, remove])
def test_killed_anywhere_and_given_again(project: Path, tmp_path: Path, command: Callable[[Path], None]) -> None:
    if command is remove:
        add(project)
    wanted = tmp_path / "wanted"
    shutil.copytree(project, wanted)
    command(wanted)
    assert agree(wanted)
    code, step = -1, -1
    while code:
        step += 2  # between its two files there are more
        root = tmp_path / f"killed-{step}"
        shutil.copytree(project, root)
        code = end_at(step, "files", KILL, lambda root=root: command(root))  # type: ignore[misc]
        assert code in (0, -KILL)
        if state(root)[0] == (project / "params.yaml").read_text():  # not done yet
            command(root)
        for name in ("params.yaml", "watch.yaml"):
            assert (root / name).read_text() == (wanted / name).read_text()
        if command is remove:
            assert not (root / "models/expert-4").exists()
            assert not (root / "checkpoints/expert-4").exists()
        shutil.rmtree(root)
    assert step > 9
