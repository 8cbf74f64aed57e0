"""What stages draw of the experts' training pairs: captions for `routing.kind: evidence`, pairs for `merged-layers`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from mode.clip.model import build_model, save_model
from mode.clustering.assignment import Assignment
from mode.data.glyphs.dataset import write_glyph_shards
from mode.data.loading.selection import is_held_out
from mode.data.loading.store import ImageStore
from mode.data.shards.index import build_index
from mode.data.shards.manifest import build_manifest
from mode.embedding.lsa import LsaEmbedder
from mode.errors import ModeError
from mode.params import GlyphParams, ImageParams, IndexParams, SourceParams, parse_params
from mode.stages.project import Project
from mode.stages.routing import evidence_of, soup_pairs
from tests.small import VIT

PARAMS: Mapping[str, object] = {
    "random_seed": 3,
    "sources": {"base": {"shards": "glyphs"}},
    "experts": {"expert-0": {"cluster": 0}, "expert-1": {"cluster": 1}},
    "model": {"name": "ViT-B-32"},
}


def project_at(root: Path, held_out: int = 0, evidence_captions: int = 1000) -> Project:
    changes = {"training": {"held_out": held_out}, "routing": {"evidence_captions": evidence_captions}}
    return Project(root, parse_params({**PARAMS, **changes}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project of 60 pairs with vectors; every third is of cluster 1."""
    write_glyph_shards(GlyphParams(pairs=60, shard_pairs=60), tmp_path / "shards", random_seed=0, workers=1)
    manifest = build_manifest(SourceParams(shards="shards"), tmp_path)
    project = project_at(tmp_path)
    build_index(manifest, tmp_path, project.index("base"), IndexParams(), 1)
    captions = project.load_index("base").captions(np.arange(60))
    for path in (project.vectors("base"), project.assignment("base")):
        path.parent.mkdir(parents=True)
    np.save(project.vectors("base"), LsaEmbedder.fit(captions, 4, 0).encode(captions).astype(np.float16))
    coarse = (np.arange(60) % 3 == 1).astype(np.int32)
    Assignment(coarse, coarse, np.zeros(60, np.float32)).save(project.assignment("base"))
    return tmp_path


def test_an_experts_captions_with_their_vectors(root: Path) -> None:
    project = project_at(root)
    texts, vectors = evidence_of(project, "expert-1")
    rows = np.arange(1, 60, 3)
    assert texts == project.load_index("base").captions(rows)
    np.testing.assert_array_equal(vectors, np.load(project.vectors("base"))[rows])


def test_as_many_of_each_expert_and_none_that_is_held_out(root: Path) -> None:
    assert [len(evidence_of(project_at(root, 0, 12), name).texts) for name in ("expert-0", "expert-1")] == [6, 6]
    project = project_at(root, held_out=30)
    index = project.load_index("base")
    left = np.flatnonzero(~is_held_out(index.image[:], 30, index.images, 3))
    kept = [*evidence_of(project, "expert-0").texts, *evidence_of(project, "expert-1").texts]
    assert sorted(kept) == sorted(index.captions(left))


def test_vectors_that_are_missing_or_of_another_index(root: Path) -> None:
    project = project_at(root)
    path = project.vectors("base")
    np.save(path, np.load(path)[:59])
    with pytest.raises(ModeError, match=r"base.npy: 59 vectors, 60 pairs in the index"):
        evidence_of(project, "expert-0")
    path.unlink()
    with pytest.raises(ModeError, match=r"base.npy: no such file"):
        evidence_of(project, "expert-0")


def test_an_expert_that_was_trained_on_has_captions_of_all_its_sources_in_proportion(root: Path) -> None:
    """30 of 60 pairs are as many as 15 of the 30 that came later."""
    base = project_at(root)
    later = {
        "sources": {"base": {"shards": "shards"}, "base-2": {"shards": "more", "continues": "base"}},
        "updates": {"v2": {"continues": "expert-1", "source": "base-2", "cluster": 1, "replays": "base"}},
    }
    write_glyph_shards(GlyphParams(pairs=30, shard_pairs=30), root / "more", random_seed=1, workers=1)
    manifest = build_manifest(SourceParams(shards="more"), root)
    build_index(manifest, root, base.index("base-2"), IndexParams(), 1)
    np.save(base.vectors("base-2"), np.ones((30, 4), np.float16) / 2)
    coarse = (np.arange(30) % 3 == 1).astype(np.int32)
    Assignment(coarse, coarse, np.zeros(30, np.float32)).save(base.assignment("base-2"))
    project = Project(root, parse_params({**PARAMS, **later, "routing": {"evidence_captions": 30}}))
    texts, vectors = evidence_of(project, "v2")
    first = [*project.load_index("base").captions(np.arange(1, 60, 3))]
    second = [*project.load_index("base-2").captions(np.arange(1, 30, 3))]
    assert (len(texts), len(vectors)) == (15, 15)
    assert set(texts[:10]) <= set(first)
    assert set(texts[10:]) <= set(second)
    assert (vectors[10:] == 0.5).all()
    assert evidence_of(project, "expert-0").texts == evidence_of(project_at(root, 0, 30), "expert-0").texts


class TestPairsOfASoup:
    @pytest.fixture
    def project(self, root: Path) -> Project:
        """With a seed for images of 16 pixels, and batches of 8; four of five pairs of the first expert's are left."""
        clip = build_model(VIT, ImageParams(size=16), ["a"], 0)
        project = Project(root, parse_params({**PARAMS, "training": {"batch_size": 8, "held_out": 12}}))
        save_model(project.model("seed"), clip, {})
        return project

    def test_each_is_drawn_once_with_its_image_and_all_batches_are_full(self, project: Project) -> None:
        index = project.load_index("base")
        left = np.flatnonzero(~is_held_out(index.image[:], 12, index.images, 3))
        store = ImageStore(index, project.root, ImageParams(size=16), cache_mb=0)
        pixels = {
            caption: store.load(np.array([row]))[0][0] for row, caption in zip(left, index.captions(left), strict=True)
        }
        batches = [*soup_pairs(project)]
        drawn = [caption for _, captions in batches for caption in captions]
        assert [len(captions) for _, captions in batches] == [8] * (len(left) // 8)
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= set(pixels)
        for images, captions in batches:
            torch.testing.assert_close(images, torch.stack([pixels[caption] for caption in captions]), rtol=0, atol=0)
        assert [captions for _, captions in soup_pairs(project)] == [captions for _, captions in batches]

    def test_of_experts_alike(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mode.stages.routing.SOUP_PAIRS", 16)
        small = project.load_index("base").captions(np.arange(1, 60, 3))
        drawn = [caption for _, captions in soup_pairs(project) for caption in captions]
        assert sum(caption in small for caption in drawn) == 8
        assert len(drawn) == 16

    def test_of_few_the_one_batch_has_all(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mode.stages.routing.SOUP_PAIRS", 6)
        assert [len(captions) for _, captions in soup_pairs(project)] == [6]

    def test_a_bad_image_is_left_out(self, project: Project) -> None:
        whole = [len(captions) for _, captions in soup_pairs(project)]
        shard = project.root / "shards" / "00000.tar"
        index = project.load_index("base")
        with shard.open("r+b") as file:
            for start, length in zip(index.offset[:30].tolist(), index.length[:30].tolist(), strict=True):
                file.seek(start + 40)
                file.write(bytes(length - 40))
        shutil.rmtree(project.index("base"))
        manifest = build_manifest(SourceParams(shards="shards"), project.root)
        build_index(manifest, project.root, project.index("base"), IndexParams(check_images=False), 1)
        batches = [*soup_pairs(project)]
        assert sum(len(captions) for _, captions in batches) < sum(whole)
        assert all(len(images) == len(captions) for images, captions in batches)
