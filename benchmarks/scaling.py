"""Rates of one core, and operations of one pair: the figures that docs/scaling.md is worked out from.

    python -m benchmarks.scaling SHARDS [--images 2000]

SHARDS is a folder of tars. Times are CPU times of one thread, so that other work on the machine changes them little;
reading from a disk or a network comes on top. Each takes a few seconds.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import torch
from transformers import BertConfig, BertModel

from benchmarks.inputs import clusters_at
from benchmarks.study import cpu_seconds
from mode.clip.model import build_model
from mode.clustering.assignment import Assignment, assign
from mode.data.images import decode, resize_and_crop
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import Manifest, build_manifest
from mode.data.shards.reading import ImageFiles
from mode.embedding.lsa import LsaEmbedder
from mode.engine import open_engine
from mode.params import ImageParams, IndexParams, ModelParams, SourceParams
from mode.permutation import permuted
from mode.training.card import flops_per_pair

#: SimCSE's encoder, BERT base, of which only the shape matters here.
BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
FINE, DIMENSIONS = 1024, 768


def show(what: str, rate: float, unit: str) -> None:
    """One line of the result."""
    print(f"{what:<44} {rate:>14,.4g} {unit}", flush=True)


def index_rates(shards: Path, folder: Path, images: int) -> PairIndex:
    """Index with and without decoding; bytes of the index."""
    everything = build_manifest(SourceParams(shards=str(shards)), folder)
    few = Manifest("tars", everything.shards[: max(1, round(len(everything.shards) * images / 18_000))])
    for check in (True, False):
        out = folder / f"index-{check}"
        seconds, _ = cpu_seconds(partial(build_index, few, folder, out, IndexParams(check_images=check), 1))
        index = PairIndex.load(out)
        show(f"index, check_images: {str(check).lower()}", index.images / seconds, "images/s")
    captions = sum(path.stat().st_size for path in (folder / "index-False" / "pairs").glob("caption.utf8"))
    size = sum(path.stat().st_size for path in (folder / "index-False").rglob("*") if path.is_file())
    show("index on disk", size / len(index), "bytes/pair")
    show("... of which text of captions", captions / len(index), "bytes/pair")
    show("image bytes", float(index.length[:].mean()), "bytes/image")
    show("captions of an image", len(index) / index.images, "pairs/image")
    return index


def image_rates(index: PairIndex, folder: Path, size: int, count: int = 200) -> None:
    """Decode and resize, as training does it: images as they are, and enlarged as shards of web images hold them."""
    files = ImageFiles(index, folder)
    images = index.first[: min(count, index.images)]
    contents = [files.read(int(row)) for row in images]
    for what, chosen in (("as it is", contents), ("from 320", [enlarged(content, 320) for content in contents])):
        seconds, _ = cpu_seconds(partial(list, (resize_and_crop(decode(content), size) for content in chosen)))
        mean = np.mean([len(content) for content in chosen])
        show(f"decode and resize to {size}, {what}, {mean:,.0f} bytes", len(chosen) / seconds, "images/s")


def enlarged(content: bytes, side: int) -> bytes:
    """The same image with a shorter side of `side` pixels, as a JPEG."""
    picture, buffer = decode(content), io.BytesIO()
    scale = side / min(picture.size)
    picture.resize((round(picture.width * scale), round(picture.height * scale))).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def embedding_rates(index: PairIndex) -> None:
    """LSA of 64 and 768 dimensions, and an encoder of BERT's shape on the CPU."""
    captions = [caption for block in index.iter_captions() for caption in block]
    show("length of a caption", float(np.mean([len(caption.encode()) for caption in captions])), "bytes")
    seconds, _ = cpu_seconds(partial(LsaEmbedder.fit(captions, 64, 0).encode, captions))
    show("embed, lsa of 64 dimensions", len(captions) / seconds, "captions/s")
    encoder = BertModel(BertConfig(vocab_size=30_522, **BERT)).eval()
    tokens = torch.randint(1000, 30_000, (16, 16))
    with torch.inference_mode():
        encoder(tokens)
        seconds, _ = cpu_seconds(lambda: [encoder(tokens) for _ in range(4)])
    show("embed, BERT base, 16 tokens, on the CPU", 64 / seconds, "captions/s")


def assignment_rates(folder: Path) -> None:
    """Nearest of 1,024 centres of 768 dimensions; size of a file of random assignments; shuffle of a pass."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((FINE, DIMENSIONS), dtype=np.float32)
    vectors = random.standard_normal((65_536, DIMENSIONS), dtype=np.float32).astype(np.float16)
    seconds, _ = cpu_seconds(lambda: assign(vectors, clusters_at(centres, 1)))
    show(f"assign, m = {FINE}, d = {DIMENSIONS}", len(vectors) / seconds, "pairs/s")
    random = np.random.default_rng(0)
    pairs = 1_000_000
    fine, coarse = (random.integers(0, most, pairs).astype(np.int32) for most in (FINE, 4))
    Assignment(fine, coarse, random.random(pairs, dtype=np.float32)).save(folder / "assignment.parquet")
    show("assignment on disk", (folder / "assignment.parquet").stat().st_size / pairs, "bytes/pair")
    seconds, _ = cpu_seconds(partial(permuted, np.arange(1_000_000), 400_000_000, 0))
    show("order of a pass of 400 million", 1_000_000 / seconds, "images/s")


def block_of_vectors(number: int) -> np.ndarray:
    """What a worker returns, without the work."""
    return np.full((65_536, DIMENSIONS), number, np.float16)


def receive_rate() -> None:
    """Vectors from workers to the stage, by the clock."""
    with open_engine("dask", processes=2) as engine:
        list(engine(block_of_vectors, range(2)))
        started = time.monotonic()
        captions = sum(len(block) for block in engine(block_of_vectors, range(24)))
        seconds = time.monotonic() - started
    show(f"received from Dask, d = {DIMENSIONS} (wall time)", captions / seconds, "captions/s")


def operations() -> None:
    """Floating-point operations of a pair in training."""
    for name in ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu"):
        clip = build_model(ModelParams(name=name, tokenizer="model"), ImageParams(size=224), [], 0)
        show(f"training, {name}", flops_per_pair(clip) / 1e9, "GFLOP/pair")
        show(f"parameters, {name}", sum(each.numel() for each in clip.model.parameters()) / 1e6, "million")


def main() -> None:
    """All of it."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("shards", type=Path)
    arguments.add_argument("--images", type=int, default=2000, help="about as many are indexed")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        index = index_rates(given.shards.resolve(), Path(temporary), given.images)
        image_rates(index, Path(temporary), 224)
        embedding_rates(index)
        assignment_rates(Path(temporary))
    receive_rate()
    operations()


if __name__ == "__main__":
    main()
