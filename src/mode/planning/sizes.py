"""Bytes on disk and in memory. Constants that were measured stand at the top, with what was measured."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mode.planning.footprint import Line

#: `data/assignment/SOURCE.parquet`: a million random rows among 1,024 centres; the demo's 40,000 rows have 10.0.
ASSIGNMENT_BYTES_PER_PAIR = 10.4
#: `data/clusters/SOURCE` beside the centres: words and sizes of each fine and coarse cluster, and the rest.
#: From the demo's 68 clusters and 10 of a smaller project.
CLUSTER_WORDS_BYTES, CLUSTER_FILES_BYTES = 146, 1_000
#: `tokenizer.json` of `model.tokenizer: words`, for each of the demo's 3,373 words; and a model's other small files.
TOKENIZER_BYTES_PER_WORD, CARD_BYTES = 21, 4_000
#: `vocabulary.json` of an `lsa` embedder, for each of the demo's 668 words.
LSA_WORD_BYTES = 9
#: Of one number.
FLOAT32, FLOAT16 = 4, 2


#: Memory of a training process before model and batch: Python, torch and open_clip as `mode stage` imports them (unique
#: resident memory after `import mode.stages.training, mode.tracking.runs`, torch 2.15), and what it has of index,
#: captions and order of samples, which hardly grows with the pairs (47 to 49 MB at 5 million, 63 to 70 at 50 million).
PROCESS_BYTES, INDEX_BYTES_IN_MEMORY = 6.0e8, 0.7e8
#: The libraries' code, once on a machine.
LIBRARIES_BYTES = 4.5e8
#: A weight in float32, and of one that is learnt also its gradient and AdamW's two moments.
WEIGHT_BYTES, LEARNING_BYTES = 4.0, 12.0
#: Of a stage that streams: what it has of a block, and libraries. `cluster` holds 100 MB of blocks at 384 dimensions.
STREAMING_BYTES = 1.0e9


def training_process_bytes(parameters: float, learnt: float, cached_bytes: float = 0.0) -> float:
    """Private memory of one training process, on the host, without the activations of a batch.

    Args:
        parameters: of the model.
        learnt: those of them that the training changes.
        cached_bytes: of decoded images that are kept, see `cached_image_bytes`.
    """
    model = parameters * WEIGHT_BYTES + learnt * LEARNING_BYTES
    return PROCESS_BYTES + INDEX_BYTES_IN_MEMORY + model + cached_bytes


@dataclass(frozen=True)
class GpuBytes:
    """A training process's bytes on its GPU, by what they are for: as if all of them were there at once.

    Attributes:
        context: CUDA and its libraries.
        weights: of the model.
        gradients, moments: of what the training changes of it; moments are AdamW's two.
        buckets: copies of the gradients that `DistributedDataParallel` sends, where several processes train one model.
        activations: of a forward pass, its images included.
        loss: vectors of the whole batch, and what the loss makes of them.
    """

    context: float
    weights: float
    gradients: float
    moments: float
    buckets: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        """All of it."""
        return float(sum(astuple(self)))


def training_gpu_bytes(
    model_bytes: float,
    learnt_bytes: float,
    dimensions: int,
    activations: Line,
    batch: float,
    devices: int = 1,
    passes: int = 1,
    context: float = 0.0,
) -> GpuBytes:
    """What each of the processes that train one model together has on its GPU.

    Args:
        model_bytes: of the weights, in the precision that they are trained in.
        learnt_bytes: of those that the training changes.
        dimensions: of a vector.
        activations: of a forward pass, by pairs (`mode.planning.footprint.Footprint`).
        batch: pairs of a step, over all processes.
        devices: processes, each with a GPU.
        passes: `training.accumulate`.
        context: bytes of CUDA and its libraries.
    """
    return GpuBytes(
        context=context,
        weights=model_bytes,
        gradients=learnt_bytes,
        moments=2 * learnt_bytes,
        buckets=learnt_bytes if devices > 1 else 0.0,
        activations=activations.of(math.ceil(batch / devices / passes)),
        loss=loss_bytes(batch, devices, dimensions),
    )


def loss_bytes(batch: float, world: int, dimensions: int) -> float:
    """What the contrastive loss has on a GPU, in float32.

    A process compares its own pairs with those of all: in both directions a matrix of logits, and one of their
    logarithms, [own, all]. Of the features of all it has what it gathers, that in one piece, and their gradients.

    Args:
        batch: pairs of a step, over all processes.
        world: processes.
        dimensions: of a vector.
    """
    own = batch / world
    logits = 4 * own * batch
    features = 2 * dimensions * (own + (3 * batch if world > 1 else 0.0))
    return FLOAT32 * (logits + features)


def training_node_bytes(process_bytes: float, processes: int) -> float:
    """Memory of a machine on which so many training processes run; `process_bytes` is private to each."""
    return processes * process_bytes + LIBRARIES_BYTES


def cached_image_bytes(images: float, size: int, cache_mb: int, crops: bool) -> float:
    """Decoded images that a training keeps: all of its own, or none (`machine.cache_mb`, `image.crop_scale`)."""
    wanted = images * 3 * size**2
    return wanted if not crops and wanted <= cache_mb * 2**20 else 0.0


def cluster_files_bytes(fine: int, coarse: int, dimensions: int) -> float:
    """`data/clusters/SOURCE`: centres in float32, and words of each cluster."""
    return (fine + coarse) * (FLOAT32 * dimensions + CLUSTER_WORDS_BYTES) + CLUSTER_FILES_BYTES


def lsa_bytes(words: float, dimensions: int) -> float:
    """`data/embedder` with `lsa`: directions and idf of each word in float32, and the words."""
    return words * (FLOAT32 * (dimensions + 1) + LSA_WORD_BYTES)
