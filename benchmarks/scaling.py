"""Rates of one core, and operations of one pair: the defaults of `mode plan`, explained in docs/scaling.md.

    python -m benchmarks.scaling SHARDS [--megabytes 64]

SHARDS is a folder of tars. Times are CPU times of one thread, so that other work on the machine changes them little;
reading from a disk or a network comes on top. Each takes a few seconds.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path

import faiss
import numpy as np
import torch

from mode.clustering.assignment import Assignment
from mode.data.images import decode
from mode.data.shards.index import PairIndex
from mode.data.shards.manifest import build_manifest
from mode.params import ClusteringParams, ImageParams, ModelParams, SourceParams
from mode.permutation import permuted
from mode.planning.hours import simcse_flops_per_caption
from mode.planning.measure import (
    assign_rate,
    bytes_of,
    decode_rate,
    encoder_rate,
    fit_rate,
    index_rate,
    lsa_rate,
    some_images,
    some_of,
)
from mode.planning.shape import shape_of
from mode.planning.trial import cpu_seconds

FINE, DIMENSIONS, FITTED = 1024, 768, 65_536


def show(what: str, rate: float, unit: str) -> None:
    """One line of the result."""
    print(f"{what:<44} {rate:>14,.4g} {unit}", flush=True)


def index_rates(shards: Path, folder: Path, size: float) -> PairIndex:
    """Index with and without decoding; bytes of the index."""
    few = some_of(build_manifest(SourceParams(shards=str(shards)), folder), size)
    for check in (True, False):
        rate, index = index_rate(few, folder, folder / f"index-{check}", check)
        show(f"index, check_images: {str(check).lower()}", rate, "images/s")
    show("index on disk", bytes_of(folder / "index-False") / len(index), "bytes/pair")
    texts = bytes_of(folder / "index-False" / "pairs" / "caption.utf8")
    show("... of which text of captions", texts / len(index), "bytes/pair")
    show("image bytes", float(index.length[:].mean()), "bytes/image")
    show("captions of an image", len(index) / index.images, "pairs/image")
    return index


def image_rates(index: PairIndex, folder: Path, size: int) -> None:
    """Decode and resize, exactly as open_clip does: images as they are, and enlarged to the size of web images."""
    contents = some_images(index, folder, 200)
    for what, chosen in (("as it is", contents), ("from 320", [enlarged(content, 320) for content in contents])):
        mean = np.mean([len(content) for content in chosen])
        rate = decode_rate(chosen, ImageParams(size=size, decode="exact"))
        show(f"decode and resize to {size}, {what}, {mean:,.0f} bytes", rate, "images/s")


def enlarged(content: bytes, side: int) -> bytes:
    """The same image with a shorter side of `side` pixels, as a JPEG."""
    picture, buffer = decode(content), io.BytesIO()
    scale = side / min(picture.size)
    picture.resize((round(picture.width * scale), round(picture.height * scale))).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def embedding_rates(index: PairIndex) -> None:
    """LSA of 64 dimensions, and an encoder of BERT's shape on the CPU."""
    captions = list(islice((caption for block in index.iter_captions() for caption in block), 200_000))
    show("length of a caption", float(np.mean([len(caption.encode()) for caption in captions])), "bytes")
    show("embed, lsa of 64 dimensions", lsa_rate(captions, 64)[0], "captions/s")
    show("embed, BERT base, 16 tokens, on the CPU", encoder_rate() / simcse_flops_per_caption(), "captions/s")


def assignment_rates(folder: Path) -> None:
    """Nearest of 1,024 centres of 768 dimensions, and a fit; a file of random assignments; the shuffle of a pass."""
    show(f"assign, m = {FINE}, d = {DIMENSIONS}", assign_rate(FINE, DIMENSIONS), "pairs/s")
    random = np.random.default_rng(0)
    vectors = random.standard_normal((FITTED, DIMENSIONS), dtype=np.float32).astype(np.float16)
    show(f"fit, m = {FINE}, d = {DIMENSIONS}", fit_rate(vectors, ClusteringParams(), FINE), "multiply-adds/s")
    pairs = 1_000_000
    fine, coarse = (random.integers(0, most, pairs).astype(np.int32) for most in (FINE, 4))
    Assignment(fine, coarse, random.random(pairs, dtype=np.float32)).save(folder / "assignment.parquet")
    show("assignment on disk", bytes_of(folder / "assignment.parquet") / pairs, "bytes/pair")
    seconds, _ = cpu_seconds(partial(permuted, np.arange(1_000_000), 400_000_000, 0))
    show("order of a pass of 400 million", 1_000_000 / seconds, "images/s")


def operations() -> None:
    """Floating-point operations of a pair in training."""
    for name in ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu"):
        shape = shape_of(ModelParams(name=name))
        show(f"training, {name}", shape.flops_per_pair / 1e9, "GFLOP/pair")
        show(f"parameters, {name}", shape.parameters / 1e6, "million")


def main() -> None:
    """All of it."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("shards", type=Path)
    arguments.add_argument("--megabytes", type=float, default=64, help="about as many are indexed")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        index = index_rates(given.shards.resolve(), Path(temporary), given.megabytes * 2**20)
        image_rates(index, Path(temporary), 224)
        embedding_rates(index)
        assignment_rates(Path(temporary))
    operations()


if __name__ == "__main__":
    main()
