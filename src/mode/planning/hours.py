"""How long a stage takes, from counts and rates: nothing here knows where either comes from.

A stage is one or more phases, one after the other. Within a phase several resources work at once, so that it takes as
long as the slowest of them needs; that one is its bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SECONDS_PER_HOUR = 3600.0

#: What a phase may wait for.
GPU, CORES, ONE_CORE, STORAGE = "GPUs", "CPU cores", "one core", "storage"
#: The process that computes, where a training runs on CPUs; and one that does not do so yet.
TRAINER, START = "training process", "its start"

#: Hours that each resource of a phase needs, were it alone.
Phase = Mapping[str, float]

#: Passes of a fit over the sample beyond `clustering.iterations`: the last one; and before, half as many as these over
#: so many vectors for each cluster (docs/performance.md, "Clustering").
_LAST_PASS, _FIRST_VECTORS = 1, 32

#: Small reads of an image in an index without decoding: two headers and a text.
SMALL_READS = 3

#: Extra time of accumulation (docstring of `mode.training.learner.backward`) and of activations that are computed again
#: (`machine.grad_checkpointing`).
ACCUMULATION = RECOMPUTATION = 4 / 3

#: Multiply-adds count as two operations.
_FLOPS_OF_MULTIPLY_ADD = 2

#: Captions of the web in tokens, and BERT base's parameters that each of them meets: SimCSE is 2 x 85 million
#: operations a token.
CAPTION_TOKENS, BERT_PARAMETERS = 16, 85e6


def hours_of(phases: Sequence[Phase]) -> float:
    """Wall hours of phases that follow one another."""
    return sum(max(phase.values(), default=0.0) for phase in phases)


def bottleneck_of(phases: Sequence[Phase]) -> str:
    """The resource that most of the time is spent waiting for; empty where no time is spent."""
    waits = waiting_hours(phases)
    return max(waits, key=lambda resource: waits[resource], default="")


def waiting_hours(phases: Sequence[Phase]) -> dict[str, float]:
    """Hours by the resource that sets the pace."""
    waits: dict[str, float] = {}
    for phase in phases:
        slowest = max(phase, key=lambda resource: phase[resource], default=None)
        if slowest is not None and phase[slowest] > 0:
            waits[slowest] = waits.get(slowest, 0.0) + phase[slowest]
    return waits


def started(phases: Sequence[Phase], seconds: float) -> list[Phase]:
    """The phases of a stage, after those that its process takes to start."""
    return [{START: seconds / SECONDS_PER_HOUR}, *phases]


def per_hour(count: float, rate_per_second: float) -> float:
    """Hours that `count` takes at a rate."""
    return count / rate_per_second / SECONDS_PER_HOUR


def index_phases(
    images: float,
    images_per_core_second: float,
    cores: int,
    read_bytes: float,
    read_bytes_per_second: float,
    small_reads: float,
    small_read_seconds: float,
) -> list[Phase]:
    """One machine's cores read the shards, a process each; `small_reads` wait one after the other in each process."""
    storage = per_hour(read_bytes, read_bytes_per_second) + small_reads * small_read_seconds / cores / SECONDS_PER_HOUR
    return [{CORES: per_hour(images, images_per_core_second * cores), STORAGE: storage}]


def lsa_phases(captions: float, captions_per_core_second: float, cores: float) -> list[Phase]:
    """`lsa` in one process, or in one for each core with an engine."""
    return [{ONE_CORE if cores == 1 else CORES: per_hour(captions, captions_per_core_second * cores)}]


def encoder_phases(
    items: float, flops_per_item: float, flops_per_second: float, resource: str, decoding: Phase | None = None
) -> list[Phase]:
    """A neural embedder on all devices that it has; of images, `decoding` goes on meanwhile."""
    return [{resource: per_hour(items * flops_per_item, flops_per_second), **(decoding or {})}]


def search_hours(vectors: float, centres: int, dimensions: int, multiply_adds_per_second: float) -> float:
    """The nearest of all centres for every vector: one matrix product."""
    return per_hour(vectors * centres * dimensions, multiply_adds_per_second)


def fit_vectors(sample: float, centres: int, iterations: int) -> float:
    """Vectors that a fit searches for, each time it does: passes x sample, and the first ones over a few vectors."""
    return sample * (iterations + _LAST_PASS) + min(sample, _FIRST_VECTORS * centres) * (iterations // 2)


def training_phases(
    trainer: str,
    samples: float,
    samples_per_second: float,
    decoded: float,
    decoded_per_second: float,
    read: float,
    read_rate: float,
) -> list[Phase]:
    """One training: the `trainer` computes, cores decode `decoded` images, and storage gives `read` bytes."""
    return [
        {
            trainer: per_hour(samples, samples_per_second),
            CORES: per_hour(decoded, decoded_per_second),
            STORAGE: per_hour(read, read_rate),
        }
    ]


def simcse_flops_per_caption() -> float:
    """2 operations for each parameter and token: 2.7 GFLOP."""
    return _FLOPS_OF_MULTIPLY_ADD * BERT_PARAMETERS * CAPTION_TOKENS
