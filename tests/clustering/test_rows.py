"""Rows: blocks of an array or a file."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from mode.clustering.rows import Rows
from mode.errors import ModeError


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 15])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_blocks_give_every_row_once(tmp_path, count, dtype):
    vectors = np.random.default_rng(0).uniform(-1, 1, (count, 3)).astype(dtype)
    np.save(tmp_path / "vectors.npy", vectors)
    for source in (vectors, np.load(tmp_path / "vectors.npy", mmap_mode="r") if count else vectors):
        seen = [(which, block.copy()) for which, block in Rows(source, block=7).blocks()]
        joined = np.concatenate([block for _, block in seen]) if seen else np.empty((0, 4), np.float32)
        assert [which.start for which, _ in seen] == list(range(0, count, 7))
        assert joined.dtype == np.float32
        assert np.array_equal(joined[:, :3], vectors.astype(np.float32))
        assert not joined[:, 3].any()


def test_chosen_rows_of_chosen_rows():
    vectors = np.arange(20, dtype=np.float32).reshape(10, 2)
    rows = Rows(vectors, np.array([1, 3, 5, 7])).subset(np.array([0, 2]))
    assert len(rows) == 2
    assert rows.take(np.array([1]))[0, :2].tolist() == [10, 11]
    assert rows.in_memory().take(np.array([0, 1]))[:, 0].tolist() == [2, 10]
    assert rows.bytes == 16


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float32), np.zeros((2, 2), np.int64), np.zeros((2, 0), np.float32)])
def test_what_is_no_table_of_vectors_is_refused(wrong):
    with pytest.raises(ModeError, match="instead of floats"):
        Rows(wrong)


#: Reads rows from all over a mapped file; prints by how many megabytes its memory grew at most.
READER = """
import sys
import numpy as np
from mode.clustering.rows import Rows

def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

vectors = np.load(sys.argv[1], mmap_mode="r")
chosen = np.arange(0, len(vectors), 20)
for _ in Rows(vectors, chosen[:2]).blocks():
    pass
before = peak()
for _ in Rows(vectors, chosen).blocks():
    pass
Rows(vectors).take(chosen)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_rows_from_all_over_a_file_do_not_bring_all_of_it_into_memory(tmp_path):
    megabytes = 512
    vectors = np.ones((megabytes * 2**20 // 768, 384), dtype=np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    command = [sys.executable, "-c", READER, str(tmp_path / "vectors.npy")]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # Three float32 copies of a twentieth of the rows, and the pages around 1,024 of them.
    assert grown < megabytes / 2


@pytest.mark.parametrize("chosen", [None, np.arange(0, 40, 2)])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 60000, -1.01])
def test_damage_in_a_file_is_named_by_its_row(tmp_path, number, chosen):
    vectors = np.random.default_rng(0).uniform(-1, 1, (40, 3)).astype(np.float16)
    vectors[22, 1] = number
    np.save(tmp_path / "vectors.npy", vectors)
    rows = Rows(np.load(tmp_path / "vectors.npy", mmap_mode="r"), chosen, block=7)
    with pytest.raises(ModeError, match=r"vectors\.npy: damaged: .* in row 22 is of no unit vector"):
        list(rows.blocks())


def test_numbers_in_memory_may_be_large_but_not_infinite():
    assert [*Rows(np.full((3, 2), 100, np.float32)).blocks()]
    with pytest.raises(ModeError, match="row 1"):
        list(Rows(np.array([[1, 2], [np.nan, 1]], np.float32)).blocks())
