"""What an embedder is, how one is built, kept and applied to an index."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mode.embedding.store import read_record
from mode.engine import Engine, in_this_process
from mode.errors import ModeError
from mode.files import sha256_of_folder, write_aside
from mode.params import EmbeddingParams, MachineParams
from mode.progress import Progress

if TYPE_CHECKING:
    from mode.data.shards.index import PairIndex

#: Captions that are embedded, written and recorded as done together.
BLOCK = 65_536


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
    if params.kind == "lsa":
        from mode.embedding.lsa import LsaEmbedder

        return LsaEmbedder.fit(sample, params.dimensions, random_seed)
    if params.name is None:
        raise ModeError(f"embedding kind '{params.kind}' needs `name`: which encoder to load")
    machine = machine or MachineParams()
    settings: dict[str, Any] = {"batch_size": machine.inference_batch, "device": machine.device}
    if params.kind == "transformers":
        from mode.embedding.transformers import TransformersEmbedder

        return TransformersEmbedder.open(params.name, pooling=params.pooling, max_tokens=params.max_tokens, **settings)
    from mode.embedding.open_clip import OpenClipEmbedder

    return OpenClipEmbedder.open(params.name, **settings)


def load_embedder(folder: Path, device: str = "auto", batch_size: int = 256) -> Embedder:
    """Open what an embedder's `save` wrote.

    Args:
        folder: the embedder's folder.
        device, batch_size: where and in what portions a neural encoder runs; `lsa` needs neither.

    Raises:
        ModeError: there is no embedder in the folder.
    """
    kind = read_record(folder).get("kind")
    if kind == "lsa":
        from mode.embedding.lsa import LsaEmbedder

        return LsaEmbedder.load(folder)
    if kind == "transformers":
        from mode.embedding.transformers import TransformersEmbedder

        return TransformersEmbedder.load(folder, device=device, batch_size=batch_size)
    if kind == "open_clip":
        from mode.embedding.open_clip import OpenClipEmbedder

        return OpenClipEmbedder.load(folder, device=device, batch_size=batch_size)
    raise ModeError(f"{folder}: an embedder of unknown kind '{kind}'", "it needs a newer version of mode")


@dataclass(frozen=True)
class StoredEmbedder:
    """Encodes with an embedder that `save` wrote, wherever this small object is sent to: it is opened there, once.

    Attributes:
        folder: the embedder's.
        content: SHA-256 of the folder, without which a worker would not notice that it has another one.
        device, batch_size: see `load_embedder`.
    """

    folder: Path
    content: str
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
        """The embedder itself.

        Raises:
            ModeError: another one is there, or none.
        """
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
    done, text_then = _read_record(record_file, partial, plan)
    if done and _digest_of_text(index, block, done) != text_then:
        done = 0
    if not done:
        np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=(pairs, embedder.dimensions)).flush()
    ahead = _Ahead(index, block, done)
    with Progress("embed captions", total=pairs, unit="captions", done=done) as bar:
        for encoded in engine(encode or embedder.encode, ahead):
            start, stop, text = ahead.written()
            # Opened anew for every block, so that finished ones do not stay in memory.
            vectors = np.lib.format.open_memmap(partial, mode="r+")
            vectors[start:stop] = encoded
            vectors.flush()
            _write_record(record_file, {**plan, "done": stop, "text": text})
            bar.update(stop - start)
    if ahead.read != pairs:
        raise ModeError(f"{out}: the index gave {ahead.read} captions for {pairs} pairs", "build the index again")
    partial.replace(out)
    record_file.unlink(missing_ok=True)
    return load_vectors(out)


class _Ahead:
    """Blocks of captions from the row `done` on, read ahead of what is written.

    Attributes:
        read: captions read so far, `done` ones included.
    """

    def __init__(self, index: PairIndex, block: int, done: int) -> None:
        self._index, self._block, self._done = index, block, done
        self._waiting: deque[tuple[int, int, str]] = deque()
        self.read = 0

    def __iter__(self) -> Iterator[list[str]]:
        digest = hashlib.sha256()
        for captions in self._index.iter_captions(self._block):
            start, self.read = self.read, self.read + len(captions)
            digest.update("\n".join(captions).encode())
            if start >= self._done:
                self._waiting.append((start, self.read, digest.hexdigest()))
                yield captions

    def written(self) -> tuple[int, int, str]:
        """First row and end of the next block to be written, and the digest of all text up to its end."""
        return self._waiting.popleft()


def load_vectors(path: Path) -> np.ndarray:
    """Vectors of an index, memory-mapped read-only. Raises `ModeError` where there are none."""
    try:
        vectors: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ModeError(f"{path}: no such file", "run the embedding stage") from None
    except ValueError as error:
        raise ModeError(f"{path}: not an array of vectors: {error}", "run the embedding stage again") from None
    return vectors


def _read_record(record_file: Path, partial: Path, plan: dict[str, Any]) -> tuple[int, str]:
    """Captions done by an interrupted call of the same plan, and the digest of their text; (0, "") if there is none."""
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        np.load(partial, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError):
        return 0, ""
    same = all(record.get(key) == value for key, value in plan.items())
    return (int(record["done"]), str(record["text"])) if same else (0, "")


def _write_record(record_file: Path, record: dict[str, Any]) -> None:
    with write_aside(record_file) as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")


def _digest_of_text(index: PairIndex, block: int, done: int) -> str:
    """SHA-256 of the first `done` captions, as `embed_index` computes it block by block."""
    digest, start = hashlib.sha256(), 0
    for captions in index.iter_captions(block):
        if start >= done:
            break
        digest.update("\n".join(captions).encode())
        start += len(captions)
    return digest.hexdigest()
