"""A workload of round numbers, for plans that are worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mode.params import Params, parse_params
from mode.planning.footprint import Footprint, Line
from mode.planning.machines import Cluster, Gpu
from mode.planning.needs import EmbedderShape, Workload
from mode.planning.shape import ModelShape

#: 5 epochs of 8,000 samples for the dense model, 3 for the seed; two experts.
PARAMS: dict[str, Any] = {
    "sources": {"base": {"shards": "/shards"}},
    "experts": {"expert-0": {"cluster": 0}, "expert-1": {"cluster": 1}},
    "model": {"name": "ViT-B-32"},
    "index": {"check_images": True},
    "clustering": {"fine": 10, "coarse": 2, "sample": 1_000, "iterations": 4},
    "training": {"epoch_samples": 8_000, "epochs": 5, "seed_epochs": 3, "batch_size": 100, "warmup": 0},
    "branch": {"outside_share": 0.1},
    "baselines": {"dense_long": True},
    "image": {"size": 10},
    "machine": {"cache_mb": 0},
}
MODEL = ModelShape(
    name="round",
    flops_per_pair=1e9,
    flops_per_image=2e8,
    flops_per_text=1e8,
    parameters=1_000_000,
    state_bytes=4_000_000,
    learnt=1_000_000,
    learnt_bytes=4_000_000,
    embed_dim=16,
    image_size=10,
    # A megabyte of activations a pair, and 3 of weights' copies.
    footprint=Footprint(activations=Line(3e6, 1e6), image=Line(0.0, 2e5), text=Line(0.0, 1e5)),
)
LSA = EmbedderShape(dimensions=20, flops_per_item=0.0, of_images=False, files_bytes=500.0)

Work = Callable[..., Workload]
Machines = Callable[..., Cluster]


def params_with(**changes: dict[str, Any]) -> Params:
    """`PARAMS` with other values of some sections."""
    return parse_params({**PARAMS, **{name: {**PARAMS.get(name, {}), **each} for name, each in changes.items()}})


def workload(pairs: int = 36_000, embedder: EmbedderShape = LSA, **changes: dict[str, Any]) -> Workload:
    """Of so many pairs."""
    return Workload(
        params_with(**changes), {"base": pairs}, {}, MODEL, embedder, evaluation_images=3_600, evaluation_texts=1_800
    )


def machines(nodes: int = 1, gpus: int = 1, per_training: int | None = None, memory: float | None = None) -> Cluster:
    """GPUs of 1 TFLOP/s, with one core each."""
    return Cluster(
        nodes=nodes,
        devices_per_node=gpus,
        device="round",
        gpu=Gpu(1e12),
        cores_per_node=gpus,
        memory_bytes_per_node=memory,
        threads=1,
        devices_per_training=per_training or gpus,
        devices_of_seed=nodes * gpus,
        is_elsewhere=False,
    )


@pytest.fixture(name="workload", scope="session")
def _workload() -> Work:
    return workload


@pytest.fixture(name="machines", scope="session")
def _machines() -> Machines:
    return machines
