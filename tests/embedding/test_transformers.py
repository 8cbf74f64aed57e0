"""Any Hugging Face encoder: equal to encoding one caption at a time with plain transformers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from mode.embedding import transformers as room
from mode.embedding.base import build_embedder, load_embedder
from mode.embedding.transformers import TransformersEmbedder
from mode.errors import ModeError
from mode.params import EmbeddingParams, MachineParams

CAPTIONS = [
    "a dog",
    "the very small red cat runs on the grass and on the blue grass and on",
    "",
    "unknown words",
    "cat",
]


def one_by_one(folder: Path, pooling: str, max_tokens: int) -> np.ndarray:
    """Naive oracle: no batch, no padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    for caption in CAPTIONS:
        with torch.no_grad():
            output = model(**tokenizer(caption, truncation=True, max_length=max_tokens, return_tensors="pt"))
        states = output.last_hidden_state[0]
        vector = {"cls": states[0], "mean": states.mean(dim=0), "pooler": output.pooler_output[0]}[pooling]
        rows.append(torch.nn.functional.normalize(vector, dim=0).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
@pytest.mark.parametrize(
    ("max_tokens", "batch_size", "chunk", "tokens"),
    [(77, 2, 3, 1_024), (5, 1, 1, 1_024), (8, 64, 16_384, 1_024), (77, 64, 16_384, 20), (77, 64, 16_384, 1)],
)
def test_equals_one_caption_at_a_time(bert, monkeypatch, pooling, max_tokens, batch_size, chunk, tokens):
    monkeypatch.setattr(room, "CHUNK", chunk)
    monkeypatch.setattr(room, "CPU_TOKENS", tokens)
    settings = {"pooling": pooling, "max_tokens": max_tokens}
    machine = MachineParams(inference_batch=batch_size, device="cpu")
    params = EmbeddingParams(kind="transformers", name=str(bert), **settings)
    embedder = build_embedder(params, [], random_seed=0, machine=machine)
    # The model has 12 positions, so that 77 tokens are cut to 12.
    expected = one_by_one(bert, pooling, min(max_tokens, 12))
    np.testing.assert_allclose(embedder.encode(CAPTIONS), expected, atol=1e-5)
    assert embedder.encode([]).shape == (0, embedder.dimensions)


def test_saved_and_loaded_without_the_original(bert, tmp_path):
    embedder = TransformersEmbedder.open(str(bert), pooling="mean", max_tokens=6, device="cpu")
    embedder.save(tmp_path / "embedder")
    assert (tmp_path / "embedder" / "encoder" / "model.safetensors").is_file()
    again = load_embedder(tmp_path / "embedder", device="cpu")
    np.testing.assert_allclose(again.encode(CAPTIONS), embedder.encode(CAPTIONS), atol=1e-6)
    assert again.fingerprint == embedder.fingerprint
    assert again.name == f"transformers:{bert}"
    assert TransformersEmbedder.open(str(bert), pooling="cls", max_tokens=6).fingerprint != embedder.fingerprint


def test_folder_without_an_encoder_is_refused(tmp_path):
    with pytest.raises(ModeError, match=r"embedding\.name .* cannot be opened"):
        TransformersEmbedder.open(str(tmp_path))


def changed(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without(folder: Path, part: str) -> None:
    """Take weights out of the file."""
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if part not in key}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: os.truncate(folder / "model.safetensors", 5_000),
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100),
        lambda folder: (folder / "tokenizer.json").write_text("[]"),
        lambda folder: (folder / "config.json").write_text("[]"),
        lambda folder: changed(folder, hidden_size="wide"),
        lambda folder: changed(folder, num_attention_heads=0),
        lambda folder: changed(folder, vocab_size=10**12),
    ],
    ids=["cut", "no weights", "no tokenizer", "no configuration", "text", "no heads", "vocabulary"],
)
def test_a_damaged_encoder_is_one_line(bert, tmp_path, damage):
    shutil.copytree(bert, tmp_path / "encoder")
    damage(tmp_path / "encoder")
    with pytest.raises(ModeError, match="cannot be opened as a transformers encoder: ") as error:
        TransformersEmbedder.open(str(tmp_path / "encoder"), device="cpu")
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_are_not_drawn_at_random(bert, tmp_path):
    """As those of a configuration with more layers than were trained."""
    shutil.copytree(bert, tmp_path / "encoder")
    without(tmp_path / "encoder", "layer.0.attention.output.dense.weight")
    with pytest.raises(ModeError, match=r"1 of its weights are not in its files, such as encoder\.layer\.0\.attention"):
        TransformersEmbedder.open(str(tmp_path / "encoder"), device="cpu")


def test_a_missing_pooler_matters_only_where_it_is_asked_for(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "encoder")
    without(tmp_path / "encoder", "pooler")
    with pytest.raises(ModeError, match=r"2 of its weights are not in its files, such as pooler\.dense\.bias"):
        TransformersEmbedder.open(str(tmp_path / "encoder"), pooling="pooler", device="cpu")
    first, second = (TransformersEmbedder.open(str(tmp_path / "encoder"), device="cpu") for _ in range(2))
    assert first.fingerprint == second.fingerprint
    whole = TransformersEmbedder.open(str(bert), device="cpu")
    np.testing.assert_array_equal(first.encode(CAPTIONS), whole.encode(CAPTIONS))


def test_a_tokenizer_that_cannot_pad_is_refused(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "encoder")
    path = tmp_path / "encoder/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": None}))
    with pytest.raises(ModeError, match="its tokenizer has no padding token"):
        TransformersEmbedder.open(str(tmp_path / "encoder"), device="cpu")


def test_pickled_weights_are_refused(bert, tmp_path):
    for file in bert.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(AutoModel.from_pretrained(bert).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModeError, match="safetensors"):
        TransformersEmbedder.open(str(tmp_path))
