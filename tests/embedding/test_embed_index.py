"""Embedding an index: rows in order, blocks, and going on after an interruption."""

from __future__ import annotations

import numpy as np
import pytest

from mode.embedding.base import embed_index, load_vectors
from mode.embedding.lsa import LsaEmbedder
from mode.errors import ModeError

BLOCK = 8
THINGS = ["dog", "cat", "shoe", "tree", "car"]


def captions_of(count: int) -> list[str]:
    return [f"{THINGS[i % 5]} beside {THINGS[i * 7 % 3]}" for i in range(count)]


class Counting:
    """An LSA that counts what it embeds and can be made to fail."""

    def __init__(self, seed: int = 0, fail_after: int | None = None) -> None:
        self._lsa = LsaEmbedder.fit(captions_of(30), 3, seed)
        self.name, self.dimensions, self.fingerprint = "counting", self._lsa.dimensions, f"seed {seed}"
        self.encoded, self._fail_after = 0, fail_after

    def encode(self, captions: list[str]) -> np.ndarray:
        if self._fail_after is not None and self.encoded >= self._fail_after:
            raise KeyboardInterrupt
        self.encoded += len(captions)
        return self._lsa.encode(captions)


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 2])
def test_rows_in_order_of_the_index(tmp_path, index_of, count):
    embedder, captions = Counting(), captions_of(count)
    vectors = embed_index(embedder, index_of(captions), tmp_path / "base" / "vectors.npy", block=BLOCK)
    assert vectors.dtype == np.float16
    assert vectors.shape == (count, 3)
    assert np.array_equal(vectors, embedder.encode(captions).astype(np.float16))
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["vectors.npy"]


def interrupted(tmp_path, index_of, captions: list[str]):
    out = tmp_path / "vectors.npy"
    with pytest.raises(KeyboardInterrupt):
        embed_index(Counting(fail_after=2 * BLOCK), index_of(captions), out, block=BLOCK)
    assert not out.exists()
    return out


def test_goes_on_where_it_was_interrupted(tmp_path, index_of):
    captions = captions_of(29)
    out = interrupted(tmp_path, index_of, captions)
    embedder = Counting()
    vectors = embed_index(embedder, index_of(captions), out, block=BLOCK)
    assert embedder.encoded == 29 - 2 * BLOCK
    assert np.array_equal(vectors, embedder.encode(captions).astype(np.float16))


def test_starts_anew_with_another_embedder_or_other_captions(tmp_path, index_of):
    captions = captions_of(29)
    out = interrupted(tmp_path, index_of, captions)
    embedder = Counting(seed=1)
    embed_index(embedder, index_of(captions), out, block=BLOCK)
    assert embedder.encoded == 29

    out.unlink()
    interrupted(tmp_path, index_of, captions)
    embedder, changed = Counting(), ["a tree", *captions[1:]]
    vectors = embed_index(embedder, index_of(changed), out, block=BLOCK)
    assert embedder.encoded == 29
    assert np.array_equal(vectors, embedder.encode(changed).astype(np.float16))


def test_vectors_that_are_not_there_or_not_vectors(tmp_path):
    with pytest.raises(ModeError, match="no such file"):
        load_vectors(tmp_path / "vectors.npy")
    (tmp_path / "vectors.npy").write_text("no array")
    with pytest.raises(ModeError, match="not an array"):
        load_vectors(tmp_path / "vectors.npy")
