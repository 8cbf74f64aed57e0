"""The text tower of a model folder, as plain open_clip computes it."""

from __future__ import annotations

from typing import get_args

import numpy as np
import open_clip
import pytest
import torch

from mode.checksums import write_manifest
from mode.embedding.base import StoredEmbedder, build_embedder, load_embedder
from mode.embedding.open_clip import OpenClipEmbedder
from mode.errors import ModeError
from mode.params import EmbeddingParams, MachineParams, View

CAPTIONS = ["a dog", "the red cat", "", "a small blue shoe"]


def test_equals_plain_open_clip(model_folder):
    params = EmbeddingParams(kind="open_clip", name=str(model_folder))
    machine = MachineParams(inference_batch=3, device="cpu")
    embedder = build_embedder(params, [], random_seed=0, machine=machine)
    model = open_clip.create_model(f"local-dir:{model_folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_folder}")
    with torch.no_grad():
        expected = model.encode_text(tokenizer(CAPTIONS), normalize=True).numpy()
    np.testing.assert_allclose(embedder.encode(CAPTIONS), expected, atol=1e-5)
    assert embedder.dimensions == 8
    assert embedder.encode([]).shape == (0, 8)


@pytest.mark.parametrize("view", ["text", "image"])
def test_vectors_are_the_same_bits_however_many_threads(model_folder, view):
    embedder = OpenClipEmbedder.open(str(model_folder), device="cpu", batch_size=16)
    captions = [f"a dog and {number} cats" for number in range(100)]
    pixels = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(embedder.encode(captions) if view == "text" else embedder.encode_images(pixels))
    finally:
        torch.set_num_threads(before)
    assert found[0].shape == (100 if view == "text" else 40, 8)
    np.testing.assert_array_equal(found[0], found[1])


def test_saved_with_the_model(model_folder, tmp_path):
    embedder = OpenClipEmbedder.open(str(model_folder), device="cpu")
    embedder.save(tmp_path / "embedder")
    again = load_embedder(tmp_path / "embedder", device="cpu")
    np.testing.assert_allclose(again.encode(CAPTIONS), embedder.encode(CAPTIONS), atol=1e-6)


def test_a_view_is_kept_and_changes_the_fingerprint(model_folder, tmp_path):
    embedders = {view: OpenClipEmbedder.open(str(model_folder), view=view, device="cpu") for view in get_args(View)}
    assert len({embedder.fingerprint for embedder in embedders.values()}) == 3
    for view, embedder in embedders.items():
        embedder.save(tmp_path / view)
        again = load_embedder(tmp_path / view, device="cpu")
        assert (again.view, again.dimensions) == (view, 16 if view == "both" else 8)
        assert np.array_equal(again.encode(CAPTIONS), embedders["text"].encode(CAPTIONS))
        assert StoredEmbedder.at(tmp_path / view).view == view
    assert "view" not in (tmp_path / "text/embedder.json").read_text()  # as older versions wrote it
    record = (tmp_path / "both/embedder.json").read_text().replace('"both"', '"smell"')
    (tmp_path / "both/embedder.json").write_text(record)
    write_manifest(tmp_path / "both")
    with pytest.raises(ModeError, match="an embedder of unknown view 'smell'"):
        load_embedder(tmp_path / "both", device="cpu")


def test_open_clips_notices_stay_unsaid(model_folder, caplog):
    with caplog.at_level("INFO"):
        OpenClipEmbedder.open(str(model_folder), device="cpu")
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-32:unheard-of", "ViT-B-32 has "),
        ("no-such-model", "neither a folder nor"),
    ],
)
def test_unknown_model_is_refused(name, message):
    with pytest.raises(ModeError, match=message):
        OpenClipEmbedder.open(name)


def test_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModeError, match="not a model folder"):
        OpenClipEmbedder.open(str(tmp_path))
