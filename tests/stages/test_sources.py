"""Sources and experts that come and go: whenever the command is killed, giving it again completes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mode.params import load_params
from mode.stages.sources import add_source, remove_expert
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
