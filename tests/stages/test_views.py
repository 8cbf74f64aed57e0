"""A project whose clusters are of images, or of captions and images, through its stages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import mode
from mode.clip.model import build_model, load_model, save_model
from mode.clustering.assignment import Assignment
from mode.clustering.hierarchy import Clusters
from mode.data.glyphs.dataset import write_glyph_tasks
from mode.embedding.base import load_embedder
from mode.ensemble.router import Router
from mode.errors import ModeError
from mode.params import RoutingParams, VariantParams, View, parse_params
from mode.results import Results
from mode.stages import preparation as stages
from mode.stages.evaluation import evaluate, variants
from mode.stages.project import Project
from mode.stages.routing import ensemble
from mode.vectors import load_vectors
from tests.evaluation.conftest import TaskFolders

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
    "variants": {"arms": ["top-1", "by-range", "best-by-label"]},
    "machine": {"device": "cpu", "inference_batch": 16},
}
#: Of an untrained model, as its card has it.
COST = {"samples_seen": 0, "flops": 0.0, "seconds": 0.0}


def prepared(root: Path, view: View, captions: list[str], **changed: object) -> Project:
    """A project with an untrained seed, as far as the assignment."""
    embedding = {"kind": "seed", "made_from": "models/seed", "view": view}
    project = Project(root, parse_params({**PARAMS, "embedding": embedding, **changed}))
    seed = build_model(project.params.model, project.params.image, captions, 0)
    save_model(project.model("seed"), seed, {"own": COST, "total": COST})
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

    for number in range(2):
        save_model(project.model(f"expert-{number}"), load_model(project.model("seed")), {"own": COST, "total": COST})
    ensemble(project)
    by_image = view == "image"
    assert ("calibrated routing by image, temperature" in capsys.readouterr().out) == by_image
    router = Router.load(project.ensemble)
    assert router.by_image == by_image
    assert router.temperature is not None
    folders = tmp_path / "tasks"
    write_glyph_tasks(project.params.glyphs, folders, 0, workers=1)
    some = [*sorted(folders.iterdir())[:2], TaskFolders(folders).retrieval("captions", 6)]
    project.task_list.parent.mkdir(parents=True, exist_ok=True)
    project.task_list.write_text(json.dumps([str(folder.relative_to(tmp_path)) for folder in some]))
    evaluate(project)
    results = Results.load(project.metrics)
    assert results.provenance["retrieval_protocol"] == ("image" if by_image else "query")
    for task in results.routing.values():
        assert sum(task.values()) == pytest.approx(1)
    assert results.zeroshot.mean["ensemble"] == results.zeroshot.mean["seed"]  # the experts are copies of it
    capsys.readouterr()
    variants(project)
    needing_words = "variants: left out top-1: they need words, and embedding.view is 'image'\n"
    assert (needing_words in capsys.readouterr().out) == by_image
    found = Results.load(project.variants).zeroshot
    assert list(found.mean) == [*([] if by_image else ["top-1"]), "by-range-1", "by-range-2", "best-by-label"]
    assert set(found.mean.values()) == {results.zeroshot.mean["seed"]}
    if by_image:
        variants(Project(tmp_path, project.params.model_copy(update={"variants": VariantParams(arms=["top-1"])})))
        assert not Results.load(project.variants).zeroshot.mean  # no arm is left, and the run goes on
        with pytest.raises(ModeError, match="weighed by each image"):
            mode.load(tmp_path / "models").adapt(["white chess king"])
    else:
        assert set(mode.load(tmp_path / "models").adapt(["white chess king"]).weights) == {"expert-0", "expert-1"}
        by_evidence = project.params.model_copy(update={"routing": RoutingParams(kind="evidence")})
        ensemble(Project(tmp_path, by_evidence))
        evidence = Router.load(project.ensemble).evidence
        assert evidence is not None
        kept = evidence.vectors
        assert [each.shape[1] for each in kept.values()] == [16, 16]
        np.testing.assert_allclose(np.linalg.norm(kept["expert-0"].astype(float), axis=1), 1, atol=0.01)


def test_one_expert_for_a_purpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is all that the ensemble needs: the rest of the pairs is for later."""
    monkeypatch.chdir(tmp_path)
    wanted = ["white chess king", "black chess queen"]
    clustering = {"strategy": "targets", "targets": wanted, "fine": 6, "coarse": 2}
    project = prepared(tmp_path, "both", wanted, clustering=clustering, experts={"chess": {"cluster": 0}})
    clusters = Clusters.load(project.clusters("base"))
    assert (clusters.strategy, clusters.coarse) == ("targets", 2)
    embedder = load_embedder(project.embedder, "cpu")
    for words in embedder.encode(wanted):
        distances = np.linalg.norm(words - np.sqrt(2) * clusters.fine_centres[:, :16], axis=1)
        assert clusters.coarse_of_fine[distances.argmin()] == 0
    assert 1 <= (clusters.coarse_of_fine == 0).sum() <= 2
    ensemble(project)
    assert Router.load(project.ensemble).weights([["a die"]]) == {"chess": 1.0}
