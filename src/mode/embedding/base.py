"""What an embedder is, how one is built, kept and applied to an index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mode.data.files import write_aside
from mode.embedding.store import read_record
from mode.errors import ModeError
from mode.params import EmbeddingParams
from mode.progress import Progress

if TYPE_CHECKING:
    from mode.data.index import PairIndex

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


def build_embedder(params: EmbeddingParams, sample: Sequence[str], seed: int) -> Embedder:
    """The embedder that the parameters ask for.

    Args:
        params: kind and settings.
        sample: captions that `lsa` is fitted on (the others need none).
        seed: of the fit.

    Raises:
        ModeError: the encoder cannot be found or opened, or `lsa` finds no word in the sample.
    """
    if params.kind == "lsa":
        from mode.embedding.lsa import LsaEmbedder

        return LsaEmbedder.fit(sample, params.dimensions, seed)
    if params.name is None:
        raise ModeError(f"embedding kind '{params.kind}' needs `name`: which encoder to load")
    settings: dict[str, Any] = {"batch_size": params.batch_size, "device": params.device}
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


def embed_index(embedder: Embedder, index: PairIndex, out: Path, block: int = BLOCK) -> np.ndarray:
    """Embed every caption of an index.

    Blocks of captions are written to `<out>.partial` as they are done, with a record of how far it got, of the embedder
    and of the text embedded so far. An interrupted call goes on after the last block if all of that still agrees, and
    starts anew if not. `out` appears when it is complete.

    Args:
        embedder: captions to vectors.
        index: the pairs.
        out: the `.npy` file to write.
        block: captions done together.

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
    digest = hashlib.sha256()
    with Progress("embed captions", total=pairs, unit="captions", done=done) as bar:
        start = 0
        for captions in index.iter_captions(block):
            stop = start + len(captions)
            digest.update("\n".join(captions).encode())
            if start >= done:
                # Opened anew for every block, so that finished ones do not stay in memory.
                vectors = np.lib.format.open_memmap(partial, mode="r+")
                vectors[start:stop] = embedder.encode(captions)
                vectors.flush()
                _write_record(record_file, {**plan, "done": stop, "text": digest.hexdigest()})
                bar.update(len(captions))
            start = stop
    if start != pairs:
        raise ModeError(f"{out}: the index gave {start} captions for {pairs} pairs", "build the index again")
    partial.replace(out)
    record_file.unlink(missing_ok=True)
    return load_vectors(out)


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
