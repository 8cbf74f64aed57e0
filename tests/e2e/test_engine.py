"""Stages on real Dask clusters: the same files, byte for byte, and faults that are told in one line."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from pyarrow import parquet

from mode.clustering.assignment import Assignment, assign, assign_file
from mode.clustering.hierarchy import fit_clusters
from mode.embedding.base import StoredEmbedder, embed_index
from mode.embedding.lsa import LsaEmbedder
from mode.embedding.transformers import TransformersEmbedder
from mode.engine import Engine, open_engine
from mode.errors import ModeError
from mode.params import ClusteringParams
from tests.embedding.conftest import WORDS, Captions, bert
from tests.waiting import wait_until

__all__ = ["bert"]  # a fixture

pytestmark = pytest.mark.e2e

BLOCK = 16


@pytest.fixture(scope="module")
def dask() -> Iterator[Engine]:
    """Two processes of this machine."""
    with open_engine("dask", processes=2) as engine:
        yield engine


def captions_of(count: int) -> Captions:
    random = np.random.default_rng(0)
    return Captions([" ".join(random.choice(WORDS, random.integers(0, 9))) for _ in range(count)])


@pytest.fixture(scope="module", params=["lsa", "transformers"])
def stored(request: pytest.FixtureRequest, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredEmbedder:
    folder = tmp_path_factory.mktemp("embedder") / request.param
    if request.param == "lsa":
        LsaEmbedder.fit(next(captions_of(200).iter_captions(200)), 5, random_seed=0).save(folder)
    else:
        TransformersEmbedder.open(str(bert), pooling="mean", device="cpu").save(folder)
    return StoredEmbedder.at(folder, device="cpu", batch_size=7)


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 9 * BLOCK + 3])
def test_vectors_are_the_same_bytes(dask: Engine, stored: StoredEmbedder, tmp_path: Path, count: int) -> None:
    index, there = captions_of(count), tmp_path / "dask.npy"
    here = embed_index(stored.open(), index, tmp_path / "local.npy", BLOCK)
    assert len(here) == count
    embed_index(stored.open(), index, there, BLOCK, engine=dask, encode=stored)
    assert there.read_bytes() == (tmp_path / "local.npy").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dask.npy", "local.npy"]


def test_vectors_go_from_the_workers_to_the_disk(dask: Engine, tmp_path: Path) -> None:
    """What comes back to the stage of a block is how many vectors there are."""
    index, out, came = captions_of(5 * BLOCK + 3), tmp_path / "vectors.npy", []
    LsaEmbedder.fit(next(index.iter_captions(200)), 5, random_seed=0).save(tmp_path / "embedder")
    stored = StoredEmbedder.at(tmp_path / "embedder")

    def noting(function, items):
        for result in dask(function, items):
            came.append(result)
            yield result

    vectors = embed_index(stored.open(), index, out, BLOCK, engine=noting, encode=stored)
    assert came == [BLOCK] * 5 + [3]
    assert np.array_equal(vectors, np.concatenate([stored(block) for block in index.iter_captions(BLOCK)]))


def test_a_worker_that_does_not_see_the_file_says_so(dask: Engine, tmp_path: Path) -> None:
    index, out = captions_of(3 * BLOCK), tmp_path / "vectors.npy"
    LsaEmbedder.fit(next(index.iter_captions(200)), 5, random_seed=0).save(tmp_path / "embedder")
    stored = StoredEmbedder.at(tmp_path / "embedder")

    def without_the_file(function, items):
        (tmp_path / "vectors.npy.partial").rename(tmp_path / "elsewhere")
        yield from dask(function, items)

    with pytest.raises(ModeError, match=r"vectors.npy.partial: not on a worker \(all workers have to see the project"):
        embed_index(stored.open(), index, out, BLOCK, engine=without_the_file, encode=stored)
    assert not out.exists()


def test_a_program_opens_one_engine_after_the_other() -> None:
    script = (
        "from mode.engine import open_engine\n"
        "if __name__ == '__main__':\n"
        "    for _ in range(2):\n"
        "        with open_engine('dask', processes=1) as engine:\n"
        "            print(list(engine(len, ['ab', 'c'])))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "[2, 1]\n[2, 1]\n", done.stderr


def test_one_engine_goes_on_where_the_other_was_interrupted(dask: Engine, tmp_path: Path) -> None:
    index, out = captions_of(5 * BLOCK + 3), tmp_path / "vectors.npy"
    LsaEmbedder.fit(next(index.iter_captions(200)), 5, random_seed=0).save(tmp_path / "embedder")
    stored = StoredEmbedder.at(tmp_path / "embedder")

    def three_blocks(function, items):
        for number, result in enumerate(dask(function, items)):
            if number == 3:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        embed_index(stored.open(), index, out, BLOCK, engine=three_blocks, encode=stored)
    encoded: list[int] = []

    def counting(captions):
        encoded.append(len(captions))
        return stored(captions)

    embed_index(stored.open(), index, out, BLOCK, encode=counting)
    assert encoded == [BLOCK, BLOCK, 3]
    assert np.array_equal(embed_index(stored.open(), index, tmp_path / "whole.npy", BLOCK), np.load(out))


@pytest.mark.parametrize("strategy", ["two-level", "random"])
@pytest.mark.parametrize("count", [BLOCK, 9 * BLOCK + 3])
def test_assignment_is_the_same_bytes(
    dask: Engine, tmp_path: Path, strategy: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Row groups of two blocks and a half: what is held back has to be cut.
    monkeypatch.setattr("mode.clustering.assignment.ROW_GROUP", 5 * BLOCK // 2)
    vectors = np.random.default_rng(count).standard_normal((count, 6))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    clusters = fit_clusters(vectors, ClusteringParams(strategy=strategy), 8, 2, random_seed=0)
    clusters.save(tmp_path / "clusters")
    for name, engine in (("local", None), ("dask", dask)):
        options = {"engine": engine} if engine else {}
        assign_file(
            tmp_path / "vectors.npy", tmp_path / "clusters", tmp_path / f"{name}.parquet", block=BLOCK, **options
        )
    assign(vectors, clusters, block=BLOCK).save(tmp_path / "saved.parquet")
    local = (tmp_path / "local.parquet").read_bytes()
    assert (tmp_path / "dask.parquet").read_bytes() == local == (tmp_path / "saved.parquet").read_bytes()
    assert parquet.read_table(tmp_path / "dask.parquet")["pair"].to_pylist() == list(range(count))
    assert len(Assignment.load(tmp_path / "dask.parquet")) == count


def test_another_embedder_on_the_workers_is_refused(dask: Engine, stored: StoredEmbedder) -> None:
    other = StoredEmbedder(stored.folder, "of something else", "cpu")
    with pytest.raises(ModeError, match="another embedder on a worker"):
        list(dask(other, [["a dog"]]))


def fail_at_two(number: int) -> int:
    if number == 2:
        raise ValueError("two is too many\nsecond line")
    return number


def die_once(marker: str) -> str:
    """The first that does it takes its process along."""
    with contextlib.suppress(FileExistsError):
        Path(marker).touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def test_a_worker_that_fails_tells_why_and_one_that_dies_is_replaced(dask: Engine, tmp_path: Path) -> None:
    results = dask(fail_at_two, range(8))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ModeError, match=r"a worker failed: ValueError: two is too many \(see its log\)$"):
        next(results)
    assert list(dask(die_once, [str(tmp_path / "died")] * 3)) == ["done"] * 3


@dataclass(frozen=True)
class DiesInTheMiddle:
    """Does a block, but the first process that comes to flush what it has written is killed then."""

    function: Callable[[Any], Any]
    marker: Path

    def __call__(self, item: Any) -> Any:
        flush = os.fsync

        def die(descriptor: int) -> None:
            with contextlib.suppress(FileExistsError):
                self.marker.touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
            flush(descriptor)

        os.fsync = die  # type: ignore[assignment]
        try:
            return self.function(item)
        finally:
            os.fsync = flush


def test_a_worker_that_dies_over_a_block_of_vectors(dask: Engine, tmp_path: Path) -> None:
    """Its block is done again, and is in the file once."""
    index, out, marker = captions_of(9 * BLOCK + 3), tmp_path / "vectors.npy", tmp_path / "died"
    LsaEmbedder.fit(next(index.iter_captions(200)), 5, random_seed=0).save(tmp_path / "embedder")
    stored = StoredEmbedder.at(tmp_path / "embedder")
    embed_index(stored.open(), index, tmp_path / "whole.npy", BLOCK)

    def dying(function, items):
        yield from dask(DiesInTheMiddle(function, marker), items)

    embed_index(stored.open(), index, out, BLOCK, engine=dying, encode=stored)
    assert marker.exists()
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()


@dataclass(frozen=True)
class DiesOnce:
    """Does a block, but the first process that has done one is killed before it can say so."""

    function: Callable[[Any], Any]
    marker: str

    def __call__(self, item: Any) -> Any:
        result = self.function(item)
        die_once(self.marker)
        return result


def test_a_worker_that_dies_over_a_block_to_assign(dask: Engine, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    vectors = random.normal(size=(5 * BLOCK + 3, 6))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    fit_clusters(vectors, ClusteringParams(), 8, 2, random_seed=0).save(tmp_path / "clusters")
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    assign_file(tmp_path / "vectors.npy", tmp_path / "clusters", whole, block=BLOCK)

    def dying(function, items):
        yield from dask(DiesOnce(function, str(tmp_path / "died")), items)

    assign_file(tmp_path / "vectors.npy", tmp_path / "clusters", out, dying, BLOCK)
    assert (tmp_path / "died").exists()
    assert out.read_bytes() == whole.read_bytes()


def test_no_scheduler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mode.engine.PATIENCE", 1)
    with (
        pytest.raises(ModeError, match=r"no Dask scheduler at tcp://127\.0\.0\.1:9: .*MODE_ENGINE=local"),
        open_engine("tcp://127.0.0.1:9", 1),
    ):
        pass


def test_a_scheduler_that_is_there_is_used_and_left_running() -> None:
    from distributed import Client, LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0", host="127.0.0.1") as cluster:
        for _ in range(2):
            with open_engine(cluster.scheduler_address, 1) as engine:
                assert list(engine(len, ["a", "bc"])) == [1, 2]
        with Client(cluster) as client:
            assert len(client.nthreads()) == 1


ENDLESS = """
import time
from mode.engine import open_engine

with open_engine("dask", processes=2) as engine:
    for _ in engine(time.sleep, [0.0, *[100.0] * 9]):
        print("ready", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_stage_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", ENDLESS]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        stage = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
    assert stage.stdout is not None
    assert stage.stdout.readline() == "ready\n", log.read_text()
    family = psutil.Process(stage.pid).children(recursive=True)
    assert len(family) >= 2
    stage.send_signal(number)
    assert stage.wait() != 0
    wait_until(lambda: not psutil.wait_procs(family, timeout=0)[1], lambda: str(family))
