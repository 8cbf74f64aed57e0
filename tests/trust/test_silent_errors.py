"""Errors that compute without a word: planted in a sound project, each is said in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from mode.checksums import write_manifest
from mode.clip.folder import CARD, CONFIG, WEIGHTS
from mode.clustering.assignment import Assignment, assign_file
from mode.embedding.base import StoredEmbedder, embed_index
from mode.embedding.lsa import LsaEmbedder
from mode.errors import ModeError
from mode.integrity import check_project
from mode.params import load_params
from mode.paths import Paths
from mode.stages import run_stage
from mode.stages.project import Project
from mode.vectors import load_vectors

pytestmark = pytest.mark.e2e  # real stages, again and again


def said(project: Path, *stage: str | None) -> str:
    """The one line that a stage ends with."""
    with pytest.raises(ModeError) as refused:
        run_stage(str(stage[0]), stage[1] if len(stage) > 1 else None, project, project / "params.yaml")
    assert "\n" not in str(refused.value)
    return str(refused.value)


def faults(project: Path) -> str:
    return "\n".join(finding.fault for finding in check_project(Paths(project)) if finding.fault)


def with_another_embedder(project: Path) -> Path:
    """An embedder of the same dimensions, and vectors made with it."""
    opened = Project(project, load_params(project / "params.yaml"))
    index, folder, vectors = opened.load_index("base"), project / "other", project / "other.npy"
    captions = [caption for block in index.iter_captions() for caption in block]
    LsaEmbedder.fit(captions[::2], 8, random_seed=1).save(folder)
    stored = StoredEmbedder.at(folder)
    embed_index(stored.open(), index, vectors, origin={"embedder": stored.content})
    return vectors


def test_an_assignment_made_with_another_embedder(project: Path) -> None:
    paths, other = Paths(project), with_another_embedder(project)
    with pytest.raises(ModeError, match="come from different embedders"):
        assign_file(other, paths.clusters("base"), paths.assignment("base"))
    # By clusters of its own, it is sound in itself; but not beside this embedder.
    shutil.move(other, paths.vectors("base"))
    run_stage("cluster", "base", project, project / "params.yaml")
    run_stage("assign", "base", project, project / "params.yaml")
    assert "come from different embedders" in said(project, "ensemble")
    for path in ("data/vectors/base.npy", "data/clusters/base", "data/assignment/base.parquet"):
        assert f"{path} and data/embedder come from different embedders" in faults(project)


def test_an_assignment_of_another_index(project: Path) -> None:
    """Its rows are other pairs."""
    path = Paths(project).assignment("base")
    whole = Assignment.load(path)
    Assignment(whole.fine[:-1], whole.coarse[:-1], whole.distance[:-1]).save(path)
    assert "of another index than" in said(project, "expert", "expert-0")
    assert "data/assignment/base.parquet: 119 pairs" in faults(project)


def test_clusters_that_the_assignment_was_not_made_with(project: Path) -> None:
    path = Paths(project).assignment("base")
    whole = Assignment.load(path)
    Assignment(whole.fine, 1 - whole.coarse, whole.distance).save(path)
    assert "data/assignment/base.parquet: names other clusters" in faults(project)


def replace_weights(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Other weights, with checksums as if they had been written so."""
    tensors = load_file(folder / WEIGHTS)
    save_file({name: change(name, each) for name, each in tensors.items()}, folder / WEIGHTS)
    write_manifest(folder)


def test_an_expert_of_another_seed(project: Path) -> None:
    replace_weights(project / "models/seed", lambda _, values: values * 1.0001)
    assert "branched from another seed than" in said(project, "evaluate")
    assert "models/expert-1: branched from another seed than models/seed" in faults(project)


@pytest.mark.parametrize(
    ("section", "key", "value"), [("model_cfg", "quick_gelu", True), ("preprocess_cfg", "std", [1, 1, 1])]
)
def test_another_activation_or_preprocessing(project: Path, section: str, key: str, value: object) -> None:
    folder = project / "models/expert-1"
    content = json.loads((folder / CONFIG).read_text())
    content[section][key] = value
    (folder / CONFIG).write_text(json.dumps(content))
    write_manifest(folder)
    assert "models/expert-1/open_clip_config.json: not the configuration of" in said(project, "evaluate")
    assert "models/expert-1/open_clip_config.json: not the configuration of" in faults(project)


def test_a_card_of_an_older_version_says_nothing_of_its_seed(project: Path) -> None:
    for name in ("dense", "expert-0", "expert-1"):
        card = json.loads((project / "models" / name / CARD).read_text())
        assert len(card.pop("parent_weights")) == 64
        (project / "models" / name / CARD).write_text(json.dumps(card))
        write_manifest(project / "models" / name)
    replace_weights(project / "models/seed", lambda _, values: values * 1.0001)
    assert faults(project) == ""


@pytest.mark.parametrize(
    ("dead", "change"),
    [
        ("gives NaN or infinite vectors", lambda _, values: values * float("nan")),
        ("gives every image the same vector", lambda name, values: values * (0 if name == "visual.proj" else 1)),
        ("gives every text the same vector", lambda name, values: values * (0 if name == "text_projection" else 1)),
    ],
)
def test_a_dead_expert(project: Path, dead: str, change: Callable[[str, Tensor], Tensor]) -> None:
    replace_weights(project / "models/expert-1", change)
    assert f"model 'expert-1' {dead}" in said(project, "evaluate")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 60000, -1.5])
def test_a_number_in_the_vectors_that_no_embedder_gives(project: Path, number: float) -> None:
    path = Paths(project).vectors("base")
    vectors = load_vectors(path)
    place = (77, 5)
    with path.open("r+b") as file:
        file.seek(vectors.offset + 2 * (place[0] * vectors.shape[1] + place[1]))
        file.write(np.float16(number).tobytes())
    for stage in ("cluster", "assign"):
        assert f"in row {place[0]} is of no unit vector" in said(project, stage, "base")
    assert "data/vectors/base.npy: damaged" in faults(project)
