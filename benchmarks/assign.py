"""Assignment: every vector to its nearest of 1,024 centres."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster import vectors_like_captions
from benchmarks.harness import Input, Outcomes, Race, Run, Target, faster, figure
from mode.planning.trial import clusters_at

#: Vectors, dimensions, centres.
SIZES = {"quick": (3_000, 16, 32), "full": (400_000, 384, 1_024), "large": (400_000, 384, 1_024)}
#: Vectors that the GEMM takes together: its products must not leave the cache's neighbourhood.
_GEMM_BLOCK = 8_192


def _make(given: Input) -> None:
    count, dimensions, clusters = SIZES[given.size]
    vectors = vectors_like_captions(count, dimensions)
    np.save(given.folder / "vectors.npy", vectors.astype(np.float16))
    chosen = np.random.default_rng(0).choice(count, clusters, replace=False)
    np.save(given.folder / "centres.npy", vectors[chosen] * np.float32(0.9))


def _ours(given: Input) -> Run:
    from mode.clustering.assignment import assign

    vectors = np.load(given.folder / "vectors.npy", mmap_mode="r")
    clusters = clusters_at(np.load(given.folder / "centres.npy"), 4)

    def run() -> dict[str, Any]:
        np.save(given.folder / "labels-mode.npy", assign(vectors, clusters).fine)
        return {}

    return run


def _faiss(given: Input) -> Run:
    import faiss

    vectors = np.load(given.folder / "vectors.npy", mmap_mode="r")
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(np.load(given.folder / "centres.npy"))

    def run() -> dict[str, Any]:
        labels = np.empty(len(vectors), np.int32)
        for start in range(0, len(vectors), 65_536):
            block = slice(start, start + 65_536)
            labels[block] = index.search(np.asarray(vectors[block], np.float32), 1)[1][:, 0]
        np.save(given.folder / "labels-faiss.npy", labels)
        return {}

    return run


def _gemm(given: Input) -> Run:
    """One matrix product and argmax a block, float32, with the product alone timed too."""
    import torch

    vectors = np.load(given.folder / "vectors.npy", mmap_mode="r")
    centres = torch.from_numpy(np.load(given.folder / "centres.npy"))
    half = centres.square().sum(dim=1) / 2
    transposed = centres.T.contiguous()
    product = torch.empty(_GEMM_BLOCK, len(centres))

    def run() -> dict[str, Any]:
        labels, alone = np.empty(len(vectors), np.int32), 0.0
        for start in range(0, len(vectors), _GEMM_BLOCK):
            block = torch.from_numpy(vectors[start : start + _GEMM_BLOCK].astype(np.float32))
            out = product[: len(block)]
            started = time.perf_counter()
            torch.mm(block, transposed, out=out)
            alone += time.perf_counter() - started
            labels[start : start + len(block)] = out.sub_(half).argmax(dim=1).numpy()
        np.save(given.folder / "labels-gemm.npy", labels)
        return {"gemm_alone_seconds": alone}

    return run


def _compare(folder: Path) -> dict[str, float]:
    ours, faiss, gemm = (np.load(folder / f"labels-{name}.npy") for name in ("mode", "faiss", "gemm"))
    # Where two differ, both centres must be as near, up to the rounding of float32.
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    centres = np.load(folder / "centres.npy").astype(np.float64)
    worst = [0.0]
    for other in (faiss, gemm):
        rows = np.flatnonzero(ours != other)[:10_000]
        to_ours, to_other = (((vectors[rows] - centres[labels[rows]]) ** 2).sum(axis=1) for labels in (ours, other))
        worst += np.abs(to_ours - to_other).tolist()
    differing = {f"differing_from_{name}": int((ours != by).sum()) for name, by in (("faiss", faiss), ("gemm", gemm))}
    return differing | {"worst_difference": max(worst)}


def _share_of_gemm(sides: Outcomes) -> float:
    return float(sides[GEMM].figures["gemm_alone_seconds"] / sides["mode"].median)


FAISS, GEMM = "faiss IndexFlatL2", "GEMM and argmax (torch)"
EXACT = "exact: where centres differ, squared distances differ by at most 1e-5"
RACES = (
    Race(
        name="assign",
        step="assign 400,000 x 384 float16 to 1,024 centres",
        sides={"mode": _ours, FAISS: _faiss, GEMM: _gemm},
        targets=(
            Target("at least 1x faiss", faster("mode", FAISS), 1.0),
            Target("at least 0.8 of the GEMM's own speed", _share_of_gemm, 0.8),
            Target(EXACT, figure("mode", "worst_difference"), 1e-5, at_most=True),
        ),
        make=_make,
        compare=_compare,
    ),
)
