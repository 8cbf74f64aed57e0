"""Bytes on disk and in memory. Constants that were measured stand at the top, with what was measured."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of a training process, in bytes.

    Attributes:
        private: of each process, whatever it trains: Python, torch and open_clip as `mode stage` imports them.
        shared: the libraries' code, once on a machine.
        private_per_pair, shared_per_pair: of the source's index and captions, for each pair of the source; shared
            ones are mapped, once on a machine. A caption's text comes on top, private or shared as `captions_shared`.
        order_per_own_pair: the order of samples, for each pair that the process trains on.
        per_parameter: weights, gradients and two moments of AdamW in float32.
    """

    # Unique and shared resident memory after `import mode.stages.training, mode.tracking.runs` (torch 2.15).
    private: float = 6.0e8
    shared: float = 4.5e8
    # file 4, image 8, offset 8, length 4, check 4; and 8 for where a caption begins: all of them arrays of each
    # process. `benchmarks.scaling` measured 87 in all, before `check`, with captions of 55 bytes.
    private_per_pair: float = 36.0
    shared_per_pair: float = 0.0
    captions_shared: bool = False
    # Measured, see docs/scaling.md: rows, images, the first row and the captions of each, two shuffles.
    order_per_own_pair: float = 48.0
    per_parameter: float = 16.0


TRAINING_MEMORY = TrainingMemory()
#: Index in memory of the stages `embed` and `cluster`, without captions, in each pair.
INDEX_BYTES_IN_MEMORY = 28.0
#: An assignment in memory, which `cluster` names its clusters by: fine, coarse, distance.
ASSIGNMENT_BYTES_IN_MEMORY = 12.0
#: Of a stage that streams: what it has of a block, and libraries. `cluster` holds 100 MB of blocks at 384 dimensions.
STREAMING_BYTES = 1.0e9


def training_process_bytes(
    pairs: float,
    own_pairs: float,
    caption_bytes: float,
    parameters: float,
    cached_bytes: float = 0.0,
    memory: TrainingMemory = TRAINING_MEMORY,
) -> float:
    """Private memory of one training process, on the host, without the activations of a batch.

    Args:
        pairs: of the source.
        own_pairs: that the model is trained on.
        caption_bytes: of one caption, before compression.
        parameters: of the model.
        cached_bytes: of decoded images that are kept, see `cached_image_bytes`.
        memory: the constants.
    """
    captions = 0.0 if memory.captions_shared else caption_bytes
    per_pair = memory.private_per_pair + captions
    index = pairs * per_pair + own_pairs * memory.order_per_own_pair
    return memory.private + index + parameters * memory.per_parameter + cached_bytes


def training_node_bytes(
    process_bytes: float,
    processes: int,
    pairs: float,
    caption_bytes: float,
    memory: TrainingMemory = TRAINING_MEMORY,
) -> float:
    """Memory of a machine on which so many training processes run; `process_bytes` is private to each."""
    captions = caption_bytes if memory.captions_shared else 0.0
    return processes * process_bytes + memory.shared + pairs * (memory.shared_per_pair + captions)


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
