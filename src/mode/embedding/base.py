"""What an embedder is, how one is built, kept and applied to an index."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mode.engine import Engine, in_this_process
from mode.errors import ModeError
from mode.files import sha256_of_folder, write_aside
from mode.params import EmbeddingParams, MachineParams
from mode.progress import Progress

if TYPE_CHECKING:
    from mode.data.shards.index import PairIndex

#: Captions that are embedded, written and recorded as done together.
BLOCK = 65_536

#: Kind, which is also the module, and its class.
_CLASSES = {"lsa": "LsaEmbedder", "transformers": "TransformersEmbedder", "open_clip": "OpenClipEmbedder"}

_RECORD = "embedder.json"


class Embedder(Protocol):
    """Captions to unit vectors."""

    @property
    def name(self) -> str:
        """What it is, such as `lsa` or `transformers:princeton-nlp/sup-simcse-bert-base-uncased`."""

    @property
    def dimensions(self) -> int:
        """Length of a vector."""

    @property
    def fingerprint(self) -> str:
        """A string that changes with anything that changes a vector."""

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Float32 [captions, dimensions] in the captions' order; unit rows, zero where nothing is known of one."""

    def save(self, folder: Path) -> None:
        """Write the folder that `load_embedder` opens; it replaces an older one when it is complete."""


def build_embedder(
    params: EmbeddingParams, sample: Sequence[str], random_seed: int, machine: MachineParams | None = None
) -> Embedder:
    """The embedder that the parameters ask for.

    Args:
        params: kind and settings.
        sample: captions that `lsa` is fitted on (the others need none).
        random_seed: of the fit.
        machine: device and batch size of a neural encoder.

    Raises:
        ModeError: the encoder cannot be found or opened, or `lsa` finds no word in the sample.
    """
    kind, machine = _class_of(params.kind), machine or MachineParams()
    if params.kind == "lsa":
        fitted: Embedder = kind.fit(sample, params.dimensions, random_seed)
        return fitted
    settings: dict[str, Any] = {"batch_size": machine.inference_batch, "device": machine.device}
    if params.kind == "transformers":
        settings |= {"pooling": params.pooling, "max_tokens": params.max_tokens}
    opened: Embedder = kind.open(params.name, **settings)
    return opened


def load_embedder(folder: Path, device: str = "auto", batch_size: int = 256) -> Embedder:
    """Open what an embedder's `save` wrote.

    Args:
        folder: the embedder's folder.
        device, batch_size: where and in what portions a neural encoder runs; `lsa` needs neither.

    Raises:
        ModeError: there is no embedder in the folder.
    """
    kind = read_record(folder).get("kind")
    if kind not in _CLASSES:
        raise ModeError(f"{folder}: an embedder of unknown kind '{kind}'", "it needs a newer version of mode")
    settings = {} if kind == "lsa" else {"device": device, "batch_size": batch_size}
    embedder: Embedder = _class_of(kind).load(folder, **settings)
    return embedder


def _class_of(kind: str) -> Any:
    """Imported only now, since torch takes seconds and `lsa` needs none."""
    return getattr(import_module(f"mode.embedding.{kind}"), _CLASSES[kind])


@contextmanager
def embedder_folder(folder: Path, kind: str, **record: Any) -> Iterator[Path]:
    """A folder to write an embedder's files into, moved to `folder` when complete; `record` is kept beside them."""
    with write_aside(folder) as temporary:
        temporary.mkdir()
        (temporary / _RECORD).write_text(json.dumps({"kind": kind, **record}, indent=2), encoding="utf-8")
        yield temporary


def read_record(folder: Path) -> dict[str, Any]:
    """What `embedder_folder` recorded. Raises `ModeError` where there is no embedder."""
    try:
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        raise ModeError(f"{folder}: no embedder there", "run the stage that builds it") from None
    return record


@dataclass(frozen=True)
class StoredEmbedder:
    """Encodes with an embedder that `save` wrote, wherever this small object is sent to: it is opened there, once."""

    folder: Path
    content: str  # SHA-256 of the folder, without which a worker would not notice that it has another one
    device: str = "auto"
    batch_size: int = 256

    @classmethod
    def at(cls, folder: Path, device: str = "auto", batch_size: int = 256) -> StoredEmbedder:
        """The embedder in this folder. Raises `ModeError` where there is none."""
        read_record(folder)
        return cls(folder, sha256_of_folder(folder), device, batch_size)

    @property
    def is_neural(self) -> bool:
        """Whether it computes on a device."""
        return read_record(self.folder).get("kind") != "lsa"

    def open(self) -> Embedder:
        """The embedder itself. Raises `ModeError` where another one is there, or none."""
        return _opened(self)

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """float16 [captions, dimensions]."""
        return self.open().encode(captions).astype(np.float16)


@lru_cache(maxsize=1)
def _opened(stored: StoredEmbedder) -> Embedder:
    embedder = load_embedder(stored.folder, stored.device, stored.batch_size)
    if sha256_of_folder(stored.folder) != stored.content:
        raise ModeError(f"{stored.folder}: another embedder on a worker", "all workers have to see the project folder")
    return embedder


def embed_index(
    embedder: Embedder,
    index: PairIndex,
    out: Path,
    block: int = BLOCK,
    engine: Engine = in_this_process,
    encode: Callable[[Sequence[str]], np.ndarray] | None = None,
) -> np.ndarray:
    """Embed every caption of an index.

    Blocks of captions are written to `<out>.partial` as they are done, with a record of how far it got, of the embedder
    and of the text embedded so far. An interrupted call goes on after the last block if all of that still agrees, and
    starts anew if not, whatever the engine of either. `out` appears when it is complete.

    Args:
        embedder: captions to vectors.
        index: the pairs.
        out: the `.npy` file to write.
        block: captions done together.
        engine: where blocks are encoded (see `mode.engine`).
        encode: what the engine is given; default `embedder.encode`. A `StoredEmbedder` is small enough to be sent.

    Returns:
        float16 [pairs, dimensions] in the index's row order, memory-mapped read-only from `out`.
    """
    pairs, partial = len(index), out.with_name(out.name + ".partial")
    record_file = partial.with_name(partial.name + ".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    plan = {"embedder": embedder.fingerprint, "shape": [pairs, embedder.dimensions], "block": block}
    done = _captions_done(record_file, partial, plan, index)
    if not done:
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=(pairs, embedder.dimensions)).flush()
    waiting: deque[tuple[int, str]] = deque()  # what is read but not written: an engine takes blocks ahead of results

    def remaining() -> Iterator[list[str]]:
        for captions, end, text in _blocks(index, block):
            if end > done:
                waiting.append((end, text))
                yield captions

    stop = done
    with Progress("embed captions", total=pairs, unit="captions", done=done) as bar:
        for encoded in engine(encode or embedder.encode, remaining()):
            start, (stop, text) = stop, waiting.popleft()
            # Opened anew for every block, so that finished ones do not stay in memory.
            vectors = np.lib.format.open_memmap(partial, mode="r+")
            vectors[start:stop] = encoded
            vectors.flush()
            with write_aside(record_file) as temporary:
                temporary.write_text(json.dumps({**plan, "done": stop, "text": text}), encoding="utf-8")
            bar.update(stop - start)
    if stop != pairs:
        raise ModeError(f"{out}: the index gave {stop} captions for {pairs} pairs", "build the index again")
    partial.replace(out)
    record_file.unlink(missing_ok=True)
    return load_vectors(out)


def _blocks(index: PairIndex, block: int) -> Iterator[tuple[list[str], int, str]]:
    """Captions, the row that they end before, and the SHA-256 of all text up to there."""
    digest, stop = hashlib.sha256(), 0
    for captions in index.iter_captions(block):
        digest.update("\n".join(captions).encode())
        stop += len(captions)
        yield captions, stop, digest.hexdigest()


def load_vectors(path: Path) -> np.ndarray:
    """Vectors of an index, memory-mapped read-only. Raises `ModeError` where there are none."""
    try:
        vectors: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ModeError(f"{path}: no such file", "run the embedding stage") from None
    except ValueError as error:
        raise ModeError(f"{path}: not an array of vectors: {error}", "run the embedding stage again") from None
    return vectors


def _captions_done(record_file: Path, partial: Path, plan: dict[str, Any], index: PairIndex) -> int:
    """Captions done by an interrupted call with the same plan and the same text so far."""
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        np.load(partial, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError):
        return 0
    if any(record.get(key) != value for key, value in plan.items()):
        return 0
    done = int(record["done"])
    text = next((text for _, stop, text in _blocks(index, plan["block"]) if stop >= done), None)
    return done if text == record["text"] else 0
