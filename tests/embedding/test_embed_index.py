"""Embedding an index: rows in order, blocks, and going on after an interruption."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mode.checksums import SEAL
from mode.embedding.base import embed_index
from mode.embedding.lsa import LsaEmbedder
from mode.errors import ModeError
from mode.vectors import load_vectors, origin_of

REPOSITORY = Path(__file__).parent.parent.parent
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


def test_other_programs_read_the_file_and_it_says_what_it_is_made_from(tmp_path, index_of):
    captions, out = captions_of(29), tmp_path / "vectors.npy"
    origin = {"embedder": "a" * 64, "index": "b" * 64}
    vectors = embed_index(Counting(), index_of(captions), out, block=BLOCK, origin=origin)
    assert np.array_equal(np.load(out), vectors)
    np.save(tmp_path / "plain.npy", vectors)
    assert out.read_bytes().startswith((tmp_path / "plain.npy").read_bytes())
    assert origin_of(out) == origin
    assert SEAL.check(out)
    assert origin_of(tmp_path / "plain.npy") == {}
    assert not SEAL.check(tmp_path / "plain.npy")


def test_the_same_bytes_after_an_interruption(tmp_path, index_of):
    captions = captions_of(29)
    embed_index(Counting(), index_of(captions), tmp_path / "whole.npy", block=BLOCK)
    out = interrupted(tmp_path, index_of, captions)
    embed_index(Counting(), index_of(captions), out, block=BLOCK)
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.parametrize("wrong", [{"done": 5}, {"done": -8}, {"done": None}, {"text": ""}, {"shape": None}])
def test_a_record_that_cannot_be_is_not_gone_on_from(tmp_path, index_of, wrong):
    captions = captions_of(29)
    out = interrupted(tmp_path, index_of, captions)
    record = out.with_name(out.name + ".partial.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), **wrong}))
    embedder = Counting()
    vectors = embed_index(embedder, index_of(captions), out, block=BLOCK)
    assert embedder.encoded == 29
    assert np.array_equal(vectors, embedder.encode(captions).astype(np.float16))


@pytest.mark.parametrize("number", [np.nan, np.inf, 1.5])
def test_an_embedder_that_gives_nonsense_is_stopped(tmp_path, index_of, number):
    def encode(captions):
        vectors = Counting().encode(captions)
        vectors[-1, -1] = number
        return vectors

    with pytest.raises(ModeError, match="counting: gives numbers that no unit vector has, for captions 0 to 8"):
        embed_index(Counting(), index_of(captions_of(29)), tmp_path / "vectors.npy", block=BLOCK, encode=encode)


def test_an_embedder_of_another_width_is_stopped(tmp_path, index_of):
    def encode(captions):
        return Counting().encode(captions)[:, :2]

    with pytest.raises(ModeError, match=r"counting: gives \(8, 2\) for 8 captions"):
        embed_index(Counting(), index_of(captions_of(29)), tmp_path / "vectors.npy", block=BLOCK, encode=encode)


def test_a_block_that_is_encoded_twice_is_written_once(tmp_path, index_of):
    """As by a worker that seemed to be dead, after the one in its place, and out of turn."""

    def twice(function, items):
        items = list(items)
        results = [function(item) for item in reversed(items)]
        yield from reversed(results)
        function(items[0])

    captions, out = captions_of(29), tmp_path / "vectors.npy"
    embed_index(Counting(), index_of(captions), tmp_path / "plain.npy", block=BLOCK)
    embed_index(Counting(), index_of(captions), out, block=BLOCK, engine=twice)
    assert out.read_bytes() == (tmp_path / "plain.npy").read_bytes()


#: Embeds with room for less than all vectors; says what it got.
FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from mode.embedding.base import embed_index
from tests.embedding.conftest import Captions

class Embedder:
    name, dimensions, fingerprint = "wide", 512, "wide"

    def encode(self, captions):
        print("encodes", flush=True)
        return np.zeros((len(captions), 512), np.float32)

if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
embed_index(Embedder(), Captions(["a dog"] * 2000), Path(sys.argv[1]), block=100)
"""


def test_a_full_disk_is_told_before_the_first_caption(tmp_path):
    """Vectors of 2 MB, and a file may have half of it; or, where file systems may be mounted, so may the disk."""
    out, limit = tmp_path / "disk" / "vectors.npy", [str(1 << 20)]
    out.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(out.parent)]
    mounted = shutil.which("mount") and not subprocess.run(mount, capture_output=True, check=False).returncode
    command = [sys.executable, "-c", FULL, str(out), *([] if mounted else limit)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        left = [*out.parent.iterdir()]
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(out.parent)], check=True)
    assert done.returncode == 1, done.returncode  # and no signal
    assert done.stdout == ""
    reason = "No space left on device" if mounted else "File too large"
    said = done.stderr.strip().splitlines()[-1]
    assert re.search(rf"vectors.npy.partial: {reason}: 2,048,\d+ bytes are needed, [\d,]+ are free \(make room", said)
    assert left == []
