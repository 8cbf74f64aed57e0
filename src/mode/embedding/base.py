"""What an embedder is, how one is built, kept and applied to an index."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mode.checksums import SEAL, check_manifest, content_of, write_manifest
from mode.engine import Engine, in_this_process
from mode.errors import ModeError
from mode.files import finish, is_there, make_room, recover, write_aside
from mode.params import EmbeddingParams, MachineParams, View
from mode.progress import Progress
from mode.vectors import LARGEST, header_of, load_vectors, trailer_of, within

if TYPE_CHECKING:
    from mode.data.shards.index import PairIndex

#: Captions that are embedded, written and recorded as done together.
BLOCK = 65_536
#: What each half of a vector of view `both` is scaled by: two halves of length 1 then make a whole of length 1.
HALF = 0.5**0.5

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

    @property
    def view(self) -> View:
        """What of a pair its vector is of; of others than `text`, `mode.embedding.pairs` makes the vectors."""

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Vectors of texts, float32 [captions, d] in their order; unit rows, zero where nothing is known of one.

        They are what an index is embedded by if the view is `text`; d is `dimensions` then.
        """

    def save(self, folder: Path) -> None:
        """Write the folder that `load_embedder` opens; it replaces an older one when it is complete."""


def text_part(vectors: np.ndarray, view: View) -> np.ndarray:
    """What can be compared with vectors of texts: of view `text` all, of `both` the texts' halves.

    A half is scaled by 1 / `HALF`, so that a centre's is the mean of its captions' unit vectors, as a centre of
    captions alone is.
    """
    return vectors[:, : vectors.shape[1] // 2] / np.float32(HALF) if view == "both" else vectors


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
    kind, machine = _class_of("open_clip" if params.kind == "seed" else params.kind), machine or MachineParams()
    if params.kind == "lsa":
        fitted: Embedder = kind.fit(sample, params.dimensions, random_seed)
        return fitted
    settings: dict[str, Any] = {"batch_size": machine.inference_batch, "device": machine.device}
    if params.kind == "transformers":
        settings |= {"pooling": params.pooling, "max_tokens": params.max_tokens}
    if params.kind == "seed":
        settings["view"] = params.view
    opened: Embedder = kind.open(params.encoder, **settings)
    return opened


def load_embedder(folder: Path, device: str = "auto", batch_size: int = 256) -> Embedder:
    """Open what an embedder's `save` wrote.

    Args:
        folder: the embedder's folder.
        device, batch_size: where and in what portions a neural encoder runs; `lsa` needs neither.

    Raises:
        ModeError: there is no embedder in the folder, or a damaged one.
    """
    record = read_record(folder)
    check_manifest(folder)
    kind = record.get("kind")
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
    """A folder to write an embedder's files into, moved to `folder` when complete; `record` is kept beside them.

    So are the checksums of all of them.
    """
    with write_aside(folder) as temporary:
        temporary.mkdir()
        (temporary / _RECORD).write_text(json.dumps({"kind": kind, **record}, indent=2), encoding="utf-8")
        yield temporary
        write_manifest(temporary)


def read_record(folder: Path) -> dict[str, Any]:
    """What `embedder_folder` recorded. Raises `ModeError` where there is no embedder."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8")) if is_there(folder) else None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise ModeError(f"{folder}: no embedder there", "run the stage that builds it")
    return record


@dataclass(frozen=True)
class StoredEmbedder:
    """Encodes with an embedder that `save` wrote, wherever this small object is sent to: it is opened there, once."""

    folder: Path
    content: str  # digest of the folder, without which a worker would not notice that it has another one
    device: str = "auto"
    batch_size: int = 256

    @classmethod
    def at(cls, folder: Path, device: str = "auto", batch_size: int = 256) -> StoredEmbedder:
        """The embedder in this folder. Raises `ModeError` where there is none."""
        read_record(folder)
        return cls(folder, content_of(folder), device, batch_size)

    @property
    def is_neural(self) -> bool:
        """Whether it computes on a device."""
        return read_record(self.folder).get("kind") != "lsa"

    @property
    def view(self) -> View:
        """As of the embedder, which is not opened for it."""
        view: View = read_record(self.folder).get("view", "text")
        return view

    def open(self) -> Embedder:
        """The embedder itself. Raises `ModeError` where another one is there, or none."""
        return _opened(self)

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """float16 [captions, dimensions]."""
        return self.open().encode(captions).astype(np.float16)


@lru_cache(maxsize=1)
def _opened(stored: StoredEmbedder) -> Embedder:
    embedder = load_embedder(stored.folder, stored.device, stored.batch_size)
    if content_of(stored.folder) != stored.content:
        raise ModeError(f"{stored.folder}: another embedder on a worker", "all workers have to see the project folder")
    return embedder


def embed_index(
    embedder: Embedder,
    index: PairIndex,
    out: Path,
    block: int = BLOCK,
    engine: Engine = in_this_process,
    encode: Callable[[Any], np.ndarray] | None = None,
    origin: Mapping[str, str] | None = None,
    numbered: bool = False,
) -> np.ndarray:
    """Embed every caption of an index, or every pair.

    Blocks of captions are written to `<out>.partial` by whoever has encoded them, and a record says how far all before
    are done, with which embedder and of which text. An interrupted call goes on from there if all of that still agrees,
    and starts anew if not, whatever the engine of either. `out` appears when it is complete, with its checksum and
    `origin` behind the array. Its room on the disk is taken before the first block.

    Args:
        embedder: captions to vectors.
        index: the pairs.
        out: the `.npy` file to write.
        block: captions done together.
        engine: where blocks are encoded (see `mode.engine`).
        encode: what makes vectors of a block; default `embedder.encode`. A `StoredEmbedder` is small enough to be sent.
        origin: what the vectors are made from, for `origin_of`.
        numbered: `encode` takes (row of the first pair, captions) in place of captions: `mode.embedding.pairs`.

    Returns:
        float16 [pairs, dimensions] in the index's row order, memory-mapped read-only from `out`.

    Raises:
        ModeError: no room on the disk; the embedder gives NaN; the index gives fewer captions than it has pairs.
    """
    pairs, partial = len(index), out.with_name(out.name + ".partial")
    record_file = partial.with_name(partial.name + ".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    plan: dict[str, Any] = {"embedder": embedder.fingerprint, "shape": [pairs, embedder.dimensions], "block": block}
    if numbered:
        plan["index"] = (origin or {}).get("index")  # the same text may be of other images
    done = _captions_done(record_file, partial, plan, index)
    header, trailer = header_of(pairs, embedder.dimensions), trailer_of(origin or {})
    row = embedder.dimensions * np.dtype(np.float16).itemsize
    if not done:
        partial.unlink(missing_ok=True)
    make_room(partial, len(header) + pairs * row + len(trailer))
    waiting: deque[tuple[int, str]] = deque()  # what is read but not written: an engine takes blocks ahead of results

    def remaining() -> Iterator[tuple[int, list[str]]]:
        for captions, end, text in _blocks(index, block):
            if end > done:
                waiting.append((end, text))
                yield end - len(captions), captions

    stop, unit = done, "pairs" if numbered else "captions"
    with partial.open("r+b") as file:
        file.write(header)
    write = _BlockWriter(encode or embedder.encode, numbered, partial.resolve(), header, row, embedder.name)
    with Progress(f"embed {unit}", total=pairs, unit=unit, done=done) as bar:
        for written in engine(write, remaining()):
            stop, text = waiting.popleft()
            with write_aside(record_file) as temporary:
                temporary.write_text(json.dumps({**plan, "done": stop, "text": text}), encoding="utf-8")
            bar.update(written)
    with partial.open("r+b") as file:
        file.seek(len(header) + pairs * row)
        file.write(trailer)
        file.truncate()
    if stop != pairs:
        raise ModeError(f"{out}: the index gave {stop} captions for {pairs} pairs", "build the index again")
    SEAL.fill(partial)
    finish(partial, out)
    record_file.unlink(missing_ok=True)
    recover(record_file)
    return load_vectors(out)


@dataclass(frozen=True)
class _BlockWriter:
    """Encodes a block and writes it to its place in the file, wherever this small object is sent to.

    So vectors pass from each worker to the disk, and none through the process of the stage. A block that is written
    twice, since its first worker seemed to be dead, is written with the same bytes.

    Attributes:
        encode: captions, or (row of the first pair, captions) if `numbered`, to vectors.
        path: of the file, which begins with `header`; each row has `row` bytes.
        name: of the embedder.
    """

    encode: Callable[[Any], np.ndarray]
    numbered: bool
    path: Path
    header: bytes
    row: int
    name: str

    def __call__(self, block: tuple[int, list[str]]) -> int:
        """Returns how many vectors there are. Raises `ModeError` for numbers that no unit vector has."""
        start, captions = block
        vectors = np.ascontiguousarray(self.encode(block if self.numbered else captions), np.float16)
        if not within(vectors, LARGEST):
            last = start + len(captions)
            message = f"{self.name}: gives numbers that no unit vector has, for captions {start:,} to {last:,}"
            raise ModeError(message, "check the embedder, and the precision that it computes in")
        if vectors.nbytes != len(captions) * self.row:
            raise ModeError(f"{self.name}: gives {vectors.shape} for {len(captions):,} captions", "check the embedder")
        try:
            with self.path.open("r+b") as file:
                if file.read(len(self.header)) != self.header:
                    raise ModeError(f"{self.path}: not the file of this stage", "is another stage writing it?")
                file.seek(len(self.header) + start * self.row)
                file.write(vectors.data)
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError:
            raise ModeError(f"{self.path}: not on a worker", "all workers have to see the project folder") from None
        return len(captions)


def _blocks(index: PairIndex, block: int) -> Iterator[tuple[list[str], int, str]]:
    """Captions, the row that they end before, and the SHA-256 of all text up to there."""
    digest, stop = hashlib.sha256(), 0
    for captions in index.iter_captions(block):
        digest.update("\n".join(captions).encode())
        stop += len(captions)
        yield captions, stop, digest.hexdigest()


def _captions_done(record_file: Path, partial: Path, plan: dict[str, Any], index: PairIndex) -> int:
    """Captions done by an interrupted call with the same plan and the same text so far."""
    header = header_of(*plan["shape"])
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        with partial.open("rb") as file:
            goes_on = file.read(len(header)) == header and plan.items() <= record.items()
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return 0
    if not goes_on:
        return 0
    done = record.get("done")
    text = next((text for _, stop, text in _blocks(index, plan["block"]) if stop == done), None)
    return int(done) if text is not None and text == record.get("text") else 0
