"""Rates of this machine, measured on a project's own data, some seconds each.

Rates of one core are CPU times of one thread, which other work on the machine changes little. So is that of a training
in one thread; on a GPU, or in several threads, it is timed by the clock. `benchmarks/scaling.py` prints the same and
more.
"""

from __future__ import annotations

import contextlib
import csv
import io
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TypeVar

import faiss
import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from mode.clip.device import side_by_side
from mode.clip.encode import unit_vectors
from mode.clip.model import build_model
from mode.clip.tokenizer import fit_words
from mode.clustering.assignment import assign
from mode.clustering.kmeans import balanced_kmeans
from mode.clustering.rows import Rows
from mode.data.images import UndecodableImage
from mode.data.loading.pixels import training_pixels
from mode.data.loading.selection import Pairs
from mode.data.shards.bounded import iter_rows, texts
from mode.data.shards.index import PairIndex, build_index
from mode.data.shards.manifest import SEPARATORS, Manifest, open_table
from mode.data.shards.reading import ImageFiles
from mode.embedding.lsa import LsaEmbedder
from mode.embedding.open_clip import OpenClipEmbedder
from mode.errors import ModeError
from mode.experiments.plan import training_plan
from mode.params import ClusteringParams, ImageParams, IndexParams, Params
from mode.planning.hours import ACCUMULATION, BERT_PARAMETERS, CAPTION_TOKENS, fit_vectors
from mode.planning.machines import device_called
from mode.planning.rates import OF_A_MODEL, Measured
from mode.planning.trial import clusters_at, cpu_seconds
from mode.progress import Progress
from mode.roles import SEED
from mode.training.batches import Batches
from mode.training.distribution import process_group
from mode.training.learner import Learner, adamw, first_model
from mode.training.plan import Training

Result = TypeVar("Result")

#: Bytes of shards that are indexed: some seconds.
_SOME_BYTES = 64 * 2**20
_ROWS = 2_000  # of a table
_IMAGES, _CAPTIONS, _VECTORS = 400, 65_536, 65_536
#: A training: seconds by the clock; or windows of a thread's own time, and the length of each in seconds.
_SECONDS, _WINDOWS = 8.0, (5, 1.0)
#: Steps that come before (compilation, memory), and operations of a step on a CPU at most: a few seconds.
_FIRST_STEPS, _FLOPS_OF_STEP = 3, 1e11
#: Captions that a model's own tower encodes, and of images a quarter.
_ENCODED = 2_048
#: Multiply-adds of a trial fit: some seconds.
_FIT = 1e11
#: What stages import before they can work: those that look at tables and vectors, ...
TABLES = "import mode.cli, mode.clustering.hierarchy, mode.data.shards.index, mode.embedding.base"
#: ... those that learn words besides, and ...
WORDS = f"{TABLES}, sklearn.feature_extraction.text"
#: ... those that run models.
MODELS = """
import torch, mode.cli, mode.training.loop, mode.tracking.store
mode.tracking.store.import_mlflow()
parameter = torch.nn.Parameter(torch.ones(1))
parameter.grad = torch.ones(1)
torch.optim.AdamW([parameter]).step()
"""
#: BERT base, of which only the shape matters.
BERT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


def some_of(manifest: Manifest, size: float = _SOME_BYTES) -> Manifest:
    """The first shards of a manifest, of about so many bytes, at least one."""
    total, shards = 0, []
    for shard in manifest.shards:
        shards.append(shard)
        total += shard.size
        if total >= size:
            break
    return replace(manifest, shards=shards, sidecars=manifest.sidecars[: len(shards)])


def first_rows(manifest: Manifest, root: Path, out: Path, rows: int = _ROWS) -> Manifest:
    """A table with the first rows of a manifest's table, written to `out`, a parquet file; and its manifest."""
    [shard] = manifest.shards
    path, columns = root / shard.path, [manifest.image_column, manifest.caption_column]
    if path.suffix == ".parquet":
        found = list(islice(iter_rows(path, str(path), columns, texts), rows))
    else:
        with open_table(path) as file:
            lines = csv.DictReader(islice(file, rows + 1), delimiter=SEPARATORS[path.suffix])
            found = [tuple(line.get(column) for column in columns) for line in lines]
    folder = path.parent.resolve()  # what relative paths start from
    images = [str(folder / image.strip()).encode(errors="replace").decode() for image, _ in found if image]
    # Bytes that are no UTF-8 cannot be kept as text; their number is what counts here.
    captions = [(caption or "").encode(errors="replace").decode() for image, caption in found if image]
    parquet.write_table(pa.table([pa.array(images, pa.string()), pa.array(captions, pa.string())], names=columns), out)
    return replace(manifest, shards=[replace(shard, path=str(out), size=out.stat().st_size)])


def index_rate(manifest: Manifest, root: Path, out: Path, check_images: bool) -> tuple[float, PairIndex]:
    """Images that one core indexes in a second, and the index, in the folder `out`."""
    params = IndexParams(check_images=check_images, max_bad_share=1.0)
    seconds, _ = cpu_seconds(partial(build_index, manifest, root, out, params, 1))
    index = PairIndex.load(out)
    return index.images / seconds, index


def some_images(index: PairIndex, root: Path, count: int = _IMAGES) -> list[bytes]:
    """Encoded images from all over an index, at most `count`; those that cannot be read are left out."""
    chosen = index.first[np.arange(0, index.images, max(1, index.images // count))[:count]]
    files = ImageFiles(index, root)
    return [content for content in files.read_many(chosen.tolist()) if not isinstance(content, OSError)]


def decode_rate(contents: Sequence[bytes], image: ImageParams) -> float:
    """Images that one core decodes and resizes in a second, as a training does."""

    def decode_all() -> int:
        good = 0
        for position, content in enumerate(contents):
            with contextlib.suppress(UndecodableImage):
                training_pixels(content, image, position, 0)
                good += 1
        return good

    seconds, good = cpu_seconds(decode_all)
    if not good:
        raise ModeError(f"none of {len(contents)} images can be decoded", "`mode verify SHARDS` says what is wrong")
    return good / seconds


def lsa_rate(captions: Sequence[str], dimensions: int, random_seed: int = 0) -> tuple[float, LsaEmbedder]:
    """Captions that one core embeds in a second, and the embedder, fitted on them."""
    embedder = LsaEmbedder.fit(captions, dimensions, random_seed)
    seconds, _ = cpu_seconds(partial(embedder.encode, captions))
    return len(captions) / seconds, embedder


def encoder_rate() -> float:
    """Operations a second of one core in an encoder of BERT base's shape, with captions of 16 tokens."""
    from transformers import BertConfig, BertModel

    encoder = BertModel(BertConfig(vocab_size=30_522, **BERT)).eval()
    tokens = torch.randint(1000, 30_000, (16, CAPTION_TOKENS))
    with torch.inference_mode(), _one_thread():
        encoder(tokens)
        seconds, _ = cpu_seconds(lambda: [encoder(tokens) for _ in range(2)])
    return 2 * 16 * CAPTION_TOKENS * 2 * BERT_PARAMETERS / seconds


def own_encoder_rate(params: Params, captions: Sequence[str], flops_per_item: float) -> float:
    """Operations a second of a core in the seed's own towers, as the embedder of `embedding.kind: seed` runs them.

    By the clock, with all of torch's threads, as the stage has them.

    Args:
        params: of the project; `embedding.view` says which towers.
        captions: some hundreds.
        flops_per_item: forward, of what is embedded of a pair.
    """
    clip = build_model(params.model, params.image, captions, params.random_seed)
    embedder = OpenClipEmbedder(clip, SEED.name, batch_size=params.machine.inference_batch, device="cpu")
    texts, view, seconds = list(islice(cycle(captions), _ENCODED)), params.embedding.view, 0.0
    if view != "image":
        seconds += _clocked(lambda: embedder.encode(texts))[0] / len(texts)
    if view != "text":
        size = params.image.size
        pixels = torch.randint(0, 256, (_ENCODED // 4, 3, size, size), dtype=torch.uint8)
        seconds += _clocked(lambda: embedder.encode_images(pixels))[0] / len(pixels)
    return flops_per_item / seconds / torch.get_num_threads()


def evaluation_rate(params: Params, captions: Sequence[str], flops_per_image: float) -> float:
    """Operations a second of a core in models' image towers, side by side as the evaluation runs them on a CPU.

    By the clock, with all of torch's threads. Decoding is not part of it.

    Args:
        params: of the project.
        captions: that the model's words are taken from.
        flops_per_image: of an image in its tower, forward.
    """
    clip = build_model(params.model, params.image, captions, params.random_seed)
    clip.model.eval()
    size, threads = params.image.size, torch.get_num_threads()
    batch = min(params.machine.inference_batch, _ENCODED // 4)
    pixels = torch.zeros(batch, 3, size, size)
    with side_by_side(torch.device("cpu"), threads) as run:
        encode = partial(unit_vectors, clip.model.encode_image, pixels)
        seconds, _ = _clocked(lambda: run(encode, ["model"] * threads))
    return flops_per_image * batch / seconds


def _clocked(work: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds by the clock that it takes, once it has been done, and what comes out."""
    work()
    began = time.monotonic()
    result = work()
    return time.monotonic() - began, result


def start_seconds(imports: str) -> float:
    """What a new process takes of one core until a stage could work: it runs `TABLES`, `WORDS` or `MODELS`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", imports], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def assign_rate(fine: int, dimensions: int, vectors: int = _VECTORS) -> float:
    """Vectors that one core finds the nearest of `fine` centres for in a second."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((fine, dimensions), dtype=np.float32)
    points = random.standard_normal((vectors, dimensions), dtype=np.float32).astype(np.float16)
    seconds, _ = cpu_seconds(lambda: assign(points, clusters_at(centres, 1)))
    return vectors / seconds


def fit_rate(vectors: np.ndarray, clustering: ClusteringParams, fine: int, random_seed: int = 0) -> float:
    """Multiply-adds a second of one core in the passes of a fit of balanced k-means.

    By the clock, with all of faiss's threads: the search is shared among them, and what else a pass does is not.

    Args:
        vectors: float16 or float32 [N, d], of captions: made-up ones would be easier to balance, or harder.
        clustering: how clusters are balanced, and the most passes; fewer where these take too long here.
        fine: centres; no more than there are vectors.
    """
    count, dimensions = len(vectors), int(vectors.shape[1])
    fine = min(fine, count)
    passes = min(clustering.iterations, max(2, round(_FIT / (count * fine * dimensions))))
    seconds, fit = _clocked(partial(balanced_kmeans, Rows(vectors), fine, clustering.balance, passes, random_seed))
    searched = fit_vectors(count, fine, fit.iterations - 1)  # it may settle before its last pass
    return searched * fine * dimensions / seconds / faiss.omp_get_max_threads()


@dataclass(frozen=True)
class TrainingRate:
    """What `training_rate` found.

    Attributes:
        samples_per_second: of one device; in one thread of a CPU, of its own time, as if nothing else ran there.
        device: that it ran on: `cpu`, or a kind of GPU.
        batch_size: of its steps; smaller than the project's where that is too much for the device.
    """

    samples_per_second: float
    device: str
    batch_size: int


def training_rate(params: Params, index: PairIndex, root: Path, flops_per_pair: float) -> TrainingRate:
    """Train for some seconds on this machine's device, as the seed is trained, and forget the model.

    Raises:
        ModeError: the seed is a pretrained model, whose folder may not be there yet; or the device cannot train.
    """
    if params.seed.pretrained:
        raise ModeError("a pretrained seed: its training is not measured", "--rates gives training_samples_per_second")
    if params.machine.threads is not None:
        torch.set_num_threads(params.machine.threads)
    group = process_group(params.machine.device)
    batch = params.training.batch_size // params.training.accumulate
    if group.device.type == "cpu":
        batch = max(2, min(batch, round(_FLOPS_OF_STEP / flops_per_pair)))
    while True:
        try:
            rate = _time_training(params, batch, index, root)
        except torch.OutOfMemoryError:
            if batch < 4:
                raise ModeError("the GPU has no memory for two pairs of this model", "choose a smaller model") from None
            batch //= 2
            torch.cuda.empty_cache()
        else:
            name = torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else group.device.type
            again = ACCUMULATION if params.training.accumulate > 1 else 1.0
            return TrainingRate(rate / again, device_called(name), batch)


def _time_training(params: Params, batch: int, index: PairIndex, root: Path) -> float:
    changes = {"batch_size": batch, "accumulate": 1, "warmup": 0, "epoch_samples": None}
    recipe = params.training.model_copy(update=changes)
    role, key = params.trainings[0]
    # Long enough for any device; epochs are of whatever length.
    plan = training_plan(params.model_copy(update={"training": recipe}), role, key, batch * 10_000)
    plan = replace(plan, pairs=Pairs.of(np.arange(len(index), dtype=np.int64), index.image[:]))
    training = Training(plan, index, params.model, params.image, recipe, params.random_seed)
    group = process_group(params.machine.device)
    clip = first_model(training, group)
    clip.model.set_grad_checkpointing(params.machine.grad_checkpointing)
    learner = Learner(training, clip.model, adamw(clip.model, recipe), group)
    batches = Batches(training, clip, plan.first_step, root, params.machine, group)

    def step(number: int) -> float:
        return float(learner.step(number, *batches.next()))  # to look at the loss is to wait for a GPU

    for number in range(_FIRST_STEPS):
        step(number)
    # In one thread of a CPU, that thread's own time: images are decoded beside it, which a plan knows of by the rate of
    # decoding. What other programs do to the caches can only slow it, so the fastest window counts.
    alone = group.device.type == "cpu" and torch.get_num_threads() == 1
    clock, windows, length = (time.thread_time, *_WINDOWS) if alone else (time.monotonic, 1, _SECONDS)
    number, fastest = _FIRST_STEPS, 0.0
    for _ in range(windows):
        began, done = clock(), 0
        while clock() - began < length:
            step(number)
            number, done = number + 1, done + 1
        fastest = max(fastest, done * batch / (clock() - began))
    return fastest


def measure(
    params: Params,
    manifest: Manifest,
    root: Path,
    dimensions: int,
    flops_per_pair: Callable[[float], float],
    flops_per_item: float,
    flops_per_image: float,
) -> Measured:
    """Measure all that can be measured here, with a bar on standard error.

    Args:
        params: of the project.
        manifest: of the source that the seed is trained on.
        root: the project folder.
        dimensions: of a vector.
        flops_per_pair: of the model, by the distinct words of the captions.
        flops_per_item: of the embedder, forward; with `embedding.kind: seed` its own towers are measured, otherwise an
            encoder of BERT base's shape.
        flops_per_image: of an image in the model's tower, forward.

    Raises:
        ModeError: the shards are not there, or have not one good pair.
    """
    values: dict[str, float] = {}
    rates = 10 if params.seed.pretrained else 12
    with tempfile.TemporaryDirectory() as temporary, Progress("measure", rates, "rates") as bar:

        def quietly(work: Callable[[], Result]) -> Result:
            """Without the bars of what is called; what it takes is counted as one."""
            with contextlib.redirect_stderr(io.StringIO()):
                result = work()
            bar.update(1)
            return result

        folder = Path(temporary)
        is_table = manifest.kind == "table"
        few = first_rows(manifest, root, folder / "few.parquet") if is_table else some_of(manifest)
        with _one_thread():
            headers, index = quietly(lambda: index_rate(few, root, folder / "headers", False))
            checked, _ = quietly(lambda: index_rate(few, root, folder / "checked", True))
            values["index_headers_images_per_core_second"] = headers
            values["index_checked_images_per_core_second"] = checked
            values["captions_per_image"] = len(index) / index.images
            values["index_bytes_per_pair"] = bytes_of(folder / "headers") / len(index)
            values["image_bytes"] = sum(shard.size for shard in few.shards) / index.images
            contents = some_images(index, root)
            if is_table:
                values["image_bytes"] = float(np.mean([len(content) for content in contents]))
            values["decode_images_per_core_second"] = quietly(lambda: decode_rate(contents, params.image))

            captions = list(islice((caption for block in index.iter_captions() for caption in block), _CAPTIONS))
            values["caption_bytes"] = float(np.mean([len(caption.encode()) for caption in captions]))
            values["tokenizer_words"] = float(len(fit_words(captions, params.model.vocabulary)))
            lsa, embedder = quietly(lambda: lsa_rate(captions, min(params.embedding.dimensions, len(captions))))
            values["lsa_captions_per_core_second"] = lsa
            values["lsa_words"] = float(len(embedder.vocabulary))
            fine, _ = params.clusters_of(params.training.source)
            vectors = quietly(lambda: assign_rate(fine, dimensions))
            values["assign_multiply_adds_per_core_second"] = vectors * fine * dimensions

        embedded = embedder.encode(captions)
        fitting = quietly(lambda: fit_rate(embedded, params.clustering, fine, params.random_seed))
        values["fit_multiply_adds_per_core_second"] = fitting
        own = params.embedding.kind == "seed" and not params.seed.pretrained
        encoding = partial(own_encoder_rate, params, captions, flops_per_item) if own else encoder_rate
        values["encoder_flops_per_core_second"] = quietly(encoding)
        starts = {"start_seconds": TABLES, "words_start_seconds": WORDS, "model_start_seconds": MODELS}
        values |= {rate: quietly(partial(start_seconds, imports)) for rate, imports in starts.items()}
        flops = flops_per_pair(values["tokenizer_words"])
        device = "cpu"
        if not params.seed.pretrained:
            evaluating = quietly(lambda: evaluation_rate(params, captions, flops_per_image))
            values["evaluation_flops_per_core_second"] = evaluating
            found = quietly(lambda: training_rate(params, index, root, flops))
            values[OF_A_MODEL], device = found.samples_per_second, found.device
            if device == "cpu":
                threads = params.machine.threads or torch.get_num_threads()
                values["training_flops_per_core_second"] = found.samples_per_second * flops / threads
    return Measured(device, flops, values)


def bytes_of(path: Path) -> int:
    """Of a file, or of all files in a folder and below it; a folder itself has none."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch and faiss, since CPU times of one core are wanted."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        faiss.omp_set_num_threads(before)
