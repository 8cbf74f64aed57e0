from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.params import ImageParams, IndexParams, ModelParams, SourceParams

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 50, 220), "yellow": (230, 220, 40)}
IMAGE = ImageParams(size=32)

RESNET = {
    "embed_dim": 16,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
}
VIT = {**RESNET, "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 16}}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def resnet() -> ModelParams:
    return ModelParams(config=RESNET, tokenizer="words")


@pytest.fixture
def vit() -> ModelParams:
    return ModelParams(config=VIT, tokenizer="words")


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `shards/`: 60 noisy plain images in two tars, each with a caption that says its colour."""
    root = tmp_path_factory.mktemp("project")
    (root / "shards").mkdir()
    random = np.random.default_rng(0)
    names = list(COLOURS)
    for shard in range(2):
        with tarfile.open(root / "shards" / f"{shard}.tar", "w") as tar:
            for number in range(30):
                colour = names[random.integers(len(names))]
                pixels = np.array(COLOURS[colour]) + random.normal(0, 12, (36, 32, 3))
                file = io.BytesIO()
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
                key = f"{shard}-{number:03}"
                _add(tar, f"{key}.png", file.getvalue())
                _add(tar, f"{key}.txt", f"a {colour} thing, number {number}".encode())
    return root


@pytest.fixture(scope="session")
def index(project: Path) -> PairIndex:
    manifest = build_manifest(SourceParams(shards="shards"), project)
    build_index(manifest, project, project / "index", IndexParams())
    return PairIndex.load(project / "index")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
