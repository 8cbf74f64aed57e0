"""Shards and tasks that lie elsewhere: DVC has to notice what changes in them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from PIL import Image
from pyarrow import parquet

from mode.data.glyphs.dataset import write_glyph_tasks
from mode.errors import ModeError
from mode.files import add_to_tar
from mode.params import GlyphParams, parse_params
from mode.stages.preparation import data, index, tasks, watch_seed, watch_tasks
from mode.stages.project import Project
from mode.stages.reports import _facts
from mode.stages.sources import keep_seed_watch
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


def test_sets_filters_and_captions_reach_the_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From params.yaml through the manifest, which alone the index stage knows them from."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    for name in ("web", "own"):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "0.tar", "w") as tar:
            for number in range(3):
                texts = {"caption": f"{name} {number}", "other": "words"}
                add_to_tar(tar, f"{number}.png", buffer.getvalue())
                add_to_tar(tar, f"{number}.json", json.dumps(texts).encode())
        rows = {"key": ["0", "1", "2"], "similarity": [0.4, 0.2, None]}
        parquet.write_table(pa.table(rows), tmp_path / name / "0.parquet")
    source = {
        "shards": {"web": 1.0, "own": 2.0},
        "filters": ["similarity >= 0.3"],
        "captions": {"caption": 0.5, "other": 0.5},
    }
    made = Project(tmp_path, parse_params({**PARAMS, "sources": {"base": source}}))
    data(made, "base")
    assert yaml.safe_load((tmp_path / "watch.yaml").read_text()) == {"generated": [], "watched": ["base"]}
    before = made.manifest("base").read_text()
    index(made, "base")
    said = capsys.readouterr().out
    assert "base: 4 pairs of 2 images; nothing bad" in said
    assert "; 2 left out by filter: nothing to filter by; 2 left out by filter: similarity >= 0.3" in said
    found = made.load_index("base")
    assert found.captions(range(4)) == ["web 0", "words", "own 0", "words"]
    assert found.factor is not None
    assert found.factor[found.file[:]].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert _facts(made, "base") == {
        "shards": "web (1 times), own (2 times)",
        "images": 2,
        "pairs": 4,
        "bad": {"similarity >= 0.3": 2, "nothing to filter by": 2},
    }
    parquet.write_table(pa.table({"key": ["0"], "similarity": [0.4]}), tmp_path / "own/0.parquet")
    with pytest.raises(ModeError, match=r"own/0.parquet: \d+ bytes, \d+ in the manifest"):
        index(made, "base")
    data(made, "base")
    assert made.manifest("base").read_text() != before


def pretrained(root: Path, name: str, weights: str | None = None) -> Project:
    seed = {"from": "pretrained", "name": name, "weights": weights}
    training = {**PARAMS["training"], "seed_epochs": 0}  # type: ignore[dict-item]
    return Project(root, parse_params({**PARAMS, "seed": seed, "model": {}, "training": training}))


def test_a_pretrained_seed_on_this_machine_is_watched_and_its_files_listed(tmp_path: Path) -> None:
    """A folder, or a file and its configuration: another one in its place has to be noticed."""
    (tmp_path / "theirs").mkdir()
    for name in ("theirs/open_clip_config.json", "theirs/model.safetensors", "w.pt", "tiny.json"):
        (tmp_path / name).write_text("x")
    for given, files in (
        (("local-dir:theirs", None), {"theirs/model.safetensors", "theirs/open_clip_config.json"}),
        (("theirs", None), {"theirs/model.safetensors", "theirs/open_clip_config.json"}),
        (("ViT-B-32", "w.pt"), {"w.pt"}),
        (("tiny.json", "w.pt"), {"w.pt", "tiny.json"}),
        (("hf-hub:org/name", None), set()),
        (("ViT-B-32", "openai"), set()),
    ):
        project = pretrained(tmp_path, *given)
        keep_seed_watch(project)
        watch = yaml.safe_load((tmp_path / "watch.yaml").read_text())
        expected = (["seed"], "data/seed-manifest.json") if files else ([], "data/names.txt")
        assert (watch["watched_seed"], watch["seed_from"]) == expected
        watch_seed(project)
        listed = json.loads((tmp_path / "data/seed-manifest.json").read_text())
        assert set(listed) == {str(tmp_path / name) for name in files}
        if files:
            changed = tmp_path / sorted(files)[0]
            changed.write_text(changed.read_text() + "y")
            watch_seed(project)
            assert json.loads((tmp_path / "data/seed-manifest.json").read_text()) != listed


@pytest.mark.parametrize("given", [("nowhere", None), ("local-dir:nowhere", None), ("ViT-B-32", "nowhere.pt")])
def test_a_pretrained_seed_that_is_not_there(tmp_path: Path, given: tuple[str, str | None]) -> None:
    with pytest.raises(ModeError, match=r"no folder|no such file"):
        watch_seed(pretrained(tmp_path, *given))
    assert not (tmp_path / "data").exists()
