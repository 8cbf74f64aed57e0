"""Inputs that several races share: tars of photograph-like pictures with captions, their index, models and a router.

Imports what it needs where it is needed: most sides use none of it, and memory is measured.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.harness import Input

if TYPE_CHECKING:
    from mode.clip.model import Clip
    from mode.data.shards.manifest import Manifest
    from mode.params import ImageParams, ModelParams

EXPERTS = ("expert-0", "expert-1", "expert-2", "expert-3")


def make_shards(given: Input, pairs: int, per_tar: int) -> None:
    """Tars in `shards`: the photographs that were given, or else made pictures, which repeat when there are more."""
    distinct = 8 if given.size == "quick" else min(pairs, 256)
    images = photographs(given.photos, 2_000) if given.photos else make_pictures(distinct)
    write_tars(given.folder / "shards", images, captions(pairs), per_tar)


def manifest_of(folder: Path) -> Manifest:
    """Of the tars in `shards`."""
    from mode.data.shards.manifest import build_manifest
    from mode.params import SourceParams

    return build_manifest(SourceParams(shards="shards"), folder)


def index_shards(folder: Path) -> None:
    """The index of `shards`, in `index`."""
    from mode.data.shards.index import build_index
    from mode.params import IndexParams

    build_index(manifest_of(folder), folder, folder / "index", IndexParams(check_images=False), workers=1)


def model_params(name: str) -> tuple[ModelParams, ImageParams]:
    """A model of open_clip at 224 pixels, or `demo`: that of params.yaml (an image of 32 x 32, 1.5 M parameters)."""
    from mode.params import ImageParams, ModelParams, load_params

    if name == "demo":
        demo = load_params(Path(__file__).parents[1] / "params.yaml")
        return demo.model, demo.image
    return ModelParams(name=name), ImageParams(size=224)


def random_experts(model: str, texts: Sequence[str]) -> dict[str, Clip]:
    """Four experts with random weights, each with its own."""
    from mode.clip.model import build_model

    return {name: build_model(*model_params(model), texts, random_seed) for random_seed, name in enumerate(EXPERTS)}


def save_router(folder: Path, texts: list[str]) -> None:
    """A router of the four experts, fitted on `texts`, in `router`."""
    from mode.clustering.hierarchy import fit_clusters
    from mode.embedding.base import build_embedder
    from mode.ensemble.router import Router
    from mode.params import ClusteringParams, EmbeddingParams, RoutingParams

    embedder = build_embedder(EmbeddingParams(dimensions=32), texts, random_seed=0)
    clusters = fit_clusters(embedder.encode(texts), ClusteringParams(fine=16), 16, 4, random_seed=0)
    conditions = {name: clusters.condition(number) for number, name in enumerate(EXPERTS)}
    Router.fit(conditions, embedder, RoutingParams(), texts, 0).save(folder / "router")


def make_pictures(count: int) -> list[bytes]:
    """JPEGs (quality 90) of smooth noise with a little grain: as large and as slow to decode as a photograph."""
    from PIL import Image

    random = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (15, 20, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        grain = random.normal(0, 5, smooth.shape).astype(np.int16)
        file = io.BytesIO()
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    return pictures


def photographs(folder: Path, count: int) -> list[bytes]:
    """The first JPEGs of a folder's tars."""
    members = (member for path in sorted(folder.rglob("*.tar")) for member in tar_members(str(path)))
    images = (content for name, content in members if name.lower().endswith((".jpg", ".jpeg")))
    found = list(islice(images, count))
    if not found:
        raise SystemExit(f"error: {folder}: no tar with a JPEG in it")
    return found


def captions(count: int, random_seed: int = 0) -> list[str]:
    """Captions of the built-in data: 1 to 12 words, a tenth of them noise; some run together into longer ones."""
    from mode.data.glyphs.dataset import caption
    from mode.data.glyphs.families import FAMILIES
    from mode.params import GlyphParams

    random = np.random.default_rng(random_seed)
    params = GlyphParams()
    kinds = [(character, family.kind) for family in FAMILIES for character in family.characters]
    colours = ("red", "green", "blue", "black", "white")
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(min(8, random.geometric(0.6))):  # as on the web: most are short, a few are whole paragraphs
            character, kind = kinds[random.integers(len(kinds))]
            pair = (colours[random.integers(5)], colours[random.integers(5)])
            parts.append(caption(character, kind, pair, params, random))
        texts.append(", ".join(parts))
    return texts


def write_tars(folder: Path, images: list[bytes], texts: list[str], per_tar: int) -> None:
    """`00000.tar`, `00001.tar` ... as img2dataset writes them: `key.jpg`, `key.json`, `key.txt`.

    There is a pair for each text; images are used again from the first when they are fewer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(texts), per_tar):
        with tarfile.open(folder / f"{start // per_tar:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(start, min(start + per_tar, len(texts))):
                key, image = f"{number:09d}", images[number % len(images)]
                about = {"caption": texts[number], "key": key, "status": "success", "width": 500, "height": 375}
                files = {"jpg": image, "json": json.dumps(about).encode(), "txt": texts[number].encode()}
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def tars_of(folder: Path) -> list[str]:
    """Paths of a folder's tars, in order."""
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def tar_members(path: str) -> Iterator[tuple[str, bytes]]:
    """Every member of a tar, name and content, as the standard library reads it from end to end."""
    with tarfile.open(path, "r|") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                yield member.name, file.read()
