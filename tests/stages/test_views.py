"""A project whose clusters are of images, or of captions and images, through its stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mode.clip.model import build_model, save_model
from mode.clustering.assignment import Assignment
from mode.clustering.hierarchy import Clusters
from mode.params import View, parse_params
from mode.stages import preparation as stages
from mode.stages.project import Project
from mode.vectors import load_vectors

PARAMS = {
    "sources": {"base": {"shards": "glyphs"}},
    "glyphs": {"pairs": 96, "shard_pairs": 48, "image_size": 16, "test_images": 2},
    "experts": {"expert-0": {"cluster": 0}, "expert-1": {"cluster": 1}},
    "model": {
        "config": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
            "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
        },
        "tokenizer": "words",
    },
    "image": {"size": 16},
    "clustering": {"fine": 6, "coarse": 2},
    "machine": {"device": "cpu", "inference_batch": 16},
}


def prepared(root: Path, view: View, captions: list[str]) -> Project:
    """A project with an untrained seed, as far as the assignment."""
    embedding = {"kind": "seed", "made_from": "models/seed", "view": view}
    project = Project(root, parse_params({**PARAMS, "embedding": embedding}))
    seed = build_model(project.params.model, project.params.image, captions, 0)
    save_model(project.model("seed"), seed, {"own": {}, "total": {}})
    stages.data(project, "base")
    stages.index(project, "base")
    stages.embedder(project)
    for stage in (stages.embed, stages.cluster, stages.assign):
        stage(project, "base")
    return project


@pytest.mark.parametrize("view", ["image", "both"])
def test_clusters_of_what_the_view_asks_for(
    tmp_path: Path, view: View, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # the seed is found as in `dvc repro`
    project = prepared(tmp_path, view, ["white chess king", "ace of hearts"])
    assert "base: 96 images embedded\n" in capsys.readouterr().out
    vectors, clusters = load_vectors(project.vectors("base")), Clusters.load(project.clusters("base"))
    assert vectors.shape == (96, 16 if view == "image" else 32)
    assert clusters.fine_centres.shape == (6, vectors.shape[1])
    found = Assignment.load(project.assignment("base"))
    distances = np.linalg.norm(vectors[:, None].astype(np.float64) - clusters.fine_centres[None], axis=2)
    np.testing.assert_allclose(found.distance, distances.min(axis=1), atol=1e-5)
