"""The text tower of a model folder, as plain open_clip computes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mode.embedding.base import build_embedder, load_embedder
from mode.embedding.open_clip import OpenClipEmbedder
from mode.errors import ModeError
from mode.params import EmbeddingParams, MachineParams

CAPTIONS = ["a dog", "the red cat", "", "a small blue shoe"]


@pytest.fixture(scope="module")
def model_folder(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP in the layout that open_clip opens with `local-dir:`."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8},
        "text_cfg": {
            "context_length": 10, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1, "hf_tokenizer_name": "local",
        },
    }  # fmt: skip
    for file in bert.glob("tokenizer*"):
        shutil.copy(file, folder)
    torch.manual_seed(1)
    model = open_clip.CLIP(**config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


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


def test_saved_with_the_model(model_folder, tmp_path):
    embedder = OpenClipEmbedder.open(str(model_folder), device="cpu")
    embedder.save(tmp_path / "embedder")
    again = load_embedder(tmp_path / "embedder", device="cpu")
    np.testing.assert_allclose(again.encode(CAPTIONS), embedder.encode(CAPTIONS), atol=1e-6)


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
