"""Small shards made on the spot."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import build_manifest
from mode.params import IndexParams, SourceParams

Files = Iterable[tuple[str, bytes]]


def encode(seed: int = 0, size: tuple[int, int] = (20, 16), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """An image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def tar_bytes(files: Files, tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of named contents, in the order given; a name may come twice."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def pair(key: str, seed: int = 0, caption: str | None = None) -> list[tuple[str, bytes]]:
    """An image and its txt."""
    return [(f"{key}.jpg", encode(seed)), (f"{key}.txt", (caption or f"caption of {key}").encode())]


def texts(key: str, captions: list[str], seed: int = 0) -> list[tuple[str, bytes]]:
    """A json of several captions, then the image, as MetaCLIP has them."""
    return [(f"{key}.json", json.dumps({"texts": captions}).encode()), (f"{key}.jpeg", encode(seed))]


@pytest.fixture(name="encode")
def _encode() -> Callable[..., bytes]:
    return encode


@pytest.fixture(name="tar_bytes")
def _tar_bytes() -> Callable[..., bytes]:
    return tar_bytes


@pytest.fixture(name="pair")
def _pair() -> Callable[..., list[tuple[str, bytes]]]:
    return pair


@pytest.fixture(name="texts")
def _texts() -> Callable[..., list[tuple[str, bytes]]]:
    return texts


@pytest.fixture
def index_of(tmp_path: Path) -> Callable[..., PairIndex]:
    """Write shards (name -> files, or bytes as they are) below `tmp_path` and index them, without looking at images."""

    def make(shards: dict[str, list[tuple[str, bytes]] | bytes], **params: object) -> PairIndex:
        folder = tmp_path / "shards"
        folder.mkdir(exist_ok=True)
        for name, content in shards.items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else tar_bytes(content))
        given = {"check_images": False, "max_bad_share": 1.0, **params}
        manifest = build_manifest(SourceParams(shards="shards"), tmp_path)
        build_index(manifest, tmp_path, tmp_path / "index", IndexParams.model_validate(given), workers=1)
        return PairIndex.load(tmp_path / "index")

    return make


@pytest.fixture
def two_sets(tmp_path: Path) -> PairIndex:
    """Two images of the set `web` (factor 1), one of them with two captions, and two of `own` (2.5), in a tar each."""
    for name, members in {
        "web/0": [*pair("a"), *texts("b", ["x", "y"])],
        "own/1": pair("c"),
        "own/0": pair("d"),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(members))
    manifest = build_manifest(SourceParams(shards={"web": 1.0, "own": 2.5}), tmp_path)
    build_index(manifest, tmp_path, tmp_path / "index", IndexParams(), workers=1)
    return PairIndex.load(tmp_path / "index")
