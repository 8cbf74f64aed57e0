"""Embedding by more and more workers: does it gain until the disk is the limit?

python -m benchmarks.workers [--captions N] [--rate R] [--work FOLDER]

The encoder waits until its time is up, as one on a GPU of its own would keep a worker waiting, so that workers do not
compete for this machine's cores: each gives R captions a second at most. Vectors have 768 dimensions, 1,536 bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from mode.embedding.base import BLOCK, embed_index
from mode.engine import open_engine

if TYPE_CHECKING:
    from mode.data.shards.index import PairIndex
    from mode.embedding.base import Embedder

WIDTH = 768


@dataclass(frozen=True)
class Throttled:
    """An encoder of so many captions a second; every vector is the same one."""

    rate: float
    name: str = "throttled"
    dimensions: int = WIDTH
    fingerprint: str = "throttled"

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """float16 [captions, WIDTH], after the time that they take."""
        until = time.monotonic() + len(captions) / self.rate
        vectors = np.full((len(captions), WIDTH), WIDTH**-0.5, np.float16)
        time.sleep(max(0.0, until - time.monotonic()))
        return vectors


class Captions:
    """What `embed_index` needs of an index."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def iter_captions(self, batch: int) -> Iterator[list[str]]:
        """55 bytes each, as on the web."""
        for start in range(0, self._count, batch):
            yield [f"{row:055d}" for row in range(start, min(start + batch, self._count))]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser("python -m benchmarks.workers", description=__doc__)
    parser.add_argument("--captions", type=int, default=40 * BLOCK)
    parser.add_argument("--rate", type=float, default=50_000.0, help="captions a second of one worker")
    parser.add_argument("--work", type=Path, help="folder on the disk to write to (default: a temporary one)")
    given = parser.parse_args()
    index = cast("PairIndex", Captions(given.captions))
    encoder = Throttled(given.rate)
    print("| workers | captions/s | MB/s |\n|---:|---:|---:|")
    for workers in (1, 2, 4):
        with tempfile.TemporaryDirectory(dir=given.work) as folder, open_engine("dask", workers) as engine:
            list(engine(len, [[]] * workers * 4))  # the workers have started
            started = time.perf_counter()
            embed_index(cast("Embedder", encoder), index, Path(folder) / "vectors.npy", engine=engine)
            rate = given.captions / (time.perf_counter() - started)
        print(f"| {workers} | {rate:,.0f} | {rate * WIDTH * 2 / 1e6:,.0f} |", flush=True)
    path = Path(tempfile.mkdtemp(dir=given.work)) / "raw"
    block, count = bytes(BLOCK * WIDTH * 2), max(given.captions // BLOCK // 4, 1)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(count):
            file.write(block)
            os.fsync(file.fileno())
    print(f"the disk alone: {count * len(block) / 1e6 / (time.perf_counter() - started):,.0f} MB/s", file=sys.stderr)
    path.unlink()
    path.parent.rmdir()


if __name__ == "__main__":
    main()
