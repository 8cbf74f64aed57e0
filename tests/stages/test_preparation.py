"""Tasks that are given as folders: DVC has to notice what changes in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mode.data.glyphs.dataset import write_glyph_tasks
from mode.errors import ModeError
from mode.params import GlyphParams, parse_params
from mode.stages.preparation import tasks, watch_tasks
from mode.stages.project import Project
from tests.stages.test_training import PARAMS

GLYPHS = {"pairs": 8, "test_images": 1}


def project(root: Path, given: object) -> Project:
    return Project(root, parse_params({**PARAMS, "glyphs": GLYPHS, "evaluation": {"tasks": given}}))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of built-in tasks."""
    folder = tmp_path_factory.mktemp("drawn")
    write_glyph_tasks(GlyphParams(pairs=8, test_images=1), folder, random_seed=0, workers=1)
    return folder


def test_given_folders_are_watched_and_their_files_listed(tmp_path: Path, drawn: Path) -> None:
    task = str(sorted(drawn.iterdir())[0])
    with_folder = project(tmp_path, [task])
    tasks(with_folder)
    watch = yaml.safe_load((tmp_path / "watch.yaml").read_text())
    assert (watch["watched_tasks"], watch["tasks_from"]) == (["tasks"], "data/tasks-manifest.json")
    assert json.loads((tmp_path / "data/tasks/tasks.json").read_text()) == [task]
    listed = json.loads((tmp_path / "data/tasks/manifest.json").read_text())
    assert set(listed[task]) == {str(path.relative_to(task)) for path in Path(task).rglob("*") if path.is_file()}

    watch_tasks(with_folder)
    manifest = tmp_path / "data/tasks-manifest.json"
    assert json.loads(manifest.read_text()) == listed
    changed = Path(task) / "classnames.txt"
    before = changed.read_text()
    try:
        changed.write_text(before.upper() + "\none more")
        watch_tasks(with_folder)
        assert json.loads(manifest.read_text()) != listed
    finally:
        changed.write_text(before)


def test_built_in_tasks_depend_on_the_code_that_draws_them(tmp_path: Path, drawn: Path) -> None:
    tasks(project(tmp_path, [str(sorted(drawn.iterdir())[0])]))
    tasks(project(tmp_path, "glyphs"))
    watch = yaml.safe_load((tmp_path / "watch.yaml").read_text())
    assert (watch["watched_tasks"], watch["tasks_from"]) == ([], "src/mode/data/glyphs")
    assert not (tmp_path / "data/tasks/manifest.json").exists()


def test_an_unusable_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ModeError, match="nowhere"):
        tasks(project(tmp_path, ["nowhere"]))
    assert not (tmp_path / "data/tasks").exists()
    assert not (tmp_path / "watch.yaml").exists()
