"""What holds for all tests: no network, and one thread per process, for the processes are as many as the cores."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mode.clip.model import build_model, save_model
from mode.embedding.lsa import LsaEmbedder
from mode.ensemble.merge import images_to_keep
from mode.ensemble.router import Router
from mode.params import ImageParams, ModelParams, RoutingParams

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "true")


CAPTIONS = ["white chess king", "black chess rook", "red queen", "ace of hearts", "two of spades", "ten of clubs"] * 3
MODEL = ModelParams(
    config={
        "embed_dim": 16,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    },
    tokenizer="words",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `models/` and the images that the examples speak of, to work in."""
    random = np.random.default_rng(0)
    for number, name in enumerate(("expert-0", "expert-1")):
        save_model(tmp_path / "models" / name, build_model(MODEL, ImageParams(size=32), CAPTIONS, number), {})
    embedder = LsaEmbedder.fit(CAPTIONS, 4, 0)
    conditions = {"expert-0": embedder.encode(CAPTIONS[:3]), "expert-1": embedder.encode(CAPTIONS[3:6])}
    fitted = Router.fit(conditions, embedder, RoutingParams(), CAPTIONS, 0)
    kept = {
        name: random.integers(0, 255, (min(40, images_to_keep(2, 32)), 3, 32, 32), dtype=np.uint8)
        for name in conditions
    }
    Router(conditions, embedder, fitted.routing, fitted.temperature, kept).save(tmp_path / "models/ensemble")
    for name in ("king", "ace", "rook"):
        Image.fromarray(random.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path
