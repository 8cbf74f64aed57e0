"""What an index costs a training in memory: `python -m benchmarks.index_memory FOLDER --pairs 5000000`.

Makes up an index of so many pairs (no images; captions of 55 bytes), with the writer that the index stage has, and an
assignment at random to four clusters. A process of its own then opens the index, chooses an expert's pairs and takes
batches of rows, captions and places of images in the order of a training; forked workers do the same. Printed is the
memory that is theirs alone (USS), beyond what Python and its libraries take. FOLDER needs 170 bytes a pair; what is
made there is removed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil

from mode.checksums import write_manifest
from mode.clustering.assignment import ROW_GROUP, SCHEMA, Assignment
from mode.data.loading.loader import PairStream
from mode.data.loading.selection import Pairs, expert_rows, write_pairs
from mode.data.shards.index import IndexWriter, PairIndex
from mode.data.shards.scan import Scan
from mode.sealed_parquet import write_sealed

CLUSTERS, BATCH = 4, 512
#: Pairs of a shard.
SHARD = 100_000


def make(folder: Path, pairs: int) -> None:
    """An index of so many pairs of as many images, and an assignment of them."""
    random = np.random.default_rng(0)
    captions = [[f"a photograph of thing {number:010d} among many others"] for number in range(SHARD)]
    keys = [f"{number:010d}" for number in range(SHARD)]
    (folder / "index").mkdir()
    with (
        IndexWriter(folder / "index", has_probabilities=False, has_factors=False) as index,
        write_sealed(folder / "assignment.parquet", SCHEMA) as assignment,
    ):
        for first in range(0, pairs, SHARD):
            numbers = range(first, min(first + SHARD, pairs))
            scan = Scan(f"{first:010d}.tar", [f"{first:010d}.tar"], 25_000 * len(numbers))
            scan.keys, scan.captions = keys[: len(numbers)], captions[: len(numbers)]
            scan.offsets = [512 + 25_000 * (number - first) for number in numbers]
            scan.lengths, scan.checks = [24_000] * len(numbers), [1] * len(numbers)
            index.add(scan, [scan.size], None, None)
            coarse = random.integers(0, CLUSTERS, len(numbers)).astype(np.int32)
            part = Assignment(coarse, coarse, np.ones(len(numbers), np.float32)).table(first)
            assignment.write_table(part, row_group_size=ROW_GROUP)
    write_manifest(folder / "index")


def own_memory() -> float:
    """Megabytes that are this process's alone."""
    return float(psutil.Process().memory_full_info().uss) / 1e6


def measure(folder: Path, batches: int, workers: int) -> dict[str, float]:
    """Seconds to open, and megabytes of this process's own beyond its present ones; and of each worker."""
    before, started = own_memory(), time.perf_counter()
    index = PairIndex.load(folder / "index")
    opened = time.perf_counter()
    index = PairIndex.load(folder / "index")
    again = time.perf_counter()
    coarse = partial(Assignment.coarse_blocks, folder / "assignment.parquet")
    write_pairs(folder / "pairs", index, expert_rows(coarse, 0, 0.05, 0), held_out=1_000, random_seed=0)
    chosen, choosing = time.perf_counter(), own_memory()
    pairs = Pairs.open(folder / "pairs")
    most = 0.0
    stream = PairStream(pairs, index.image, 0, index.probability)
    for number in range(batches):
        take(stream, index, number)
        if number % 50 == 0:
            most = max(most, own_memory())
    seconds = time.perf_counter() - chosen
    each = _workers(stream, index, batches // max(1, workers), workers)
    return {
        "open_s": opened - started,
        "again_s": again - opened,
        "choose_s": chosen - again,
        "choose_mb": choosing - before,
        "batch_ms": 1e3 * seconds / batches,
        "own_mb": max(most, own_memory()) - before,
        "worker_mb": max(each, default=0.0),
        "pairs_of_expert": float(len(pairs)),
    }


def take(stream: PairStream, index: PairIndex, number: int) -> None:
    """What a training reads of an index for one batch."""
    rows = stream.rows_at(number * BATCH, BATCH)
    index.captions(rows)
    for column in (index.file, index.offset, index.length, index.check):
        for row in rows.tolist():
            column[row]


def _workers(stream: PairStream, index: PairIndex, batches: int, workers: int) -> list[float]:
    """Megabytes of each of so many forked processes' own after so many batches, while all of them are there."""
    context = multiprocessing.get_context("fork")
    ends: list[Connection] = []
    processes = []
    for worker in range(workers):
        here, there = context.Pipe()
        processes.append(context.Process(target=_work, args=(stream, index, worker, workers, batches, there)))
        ends.append(here)
        processes[-1].start()
    found = [end.recv() for end in ends]
    for end in ends:
        end.send(None)
    for process in processes:
        process.join()
    return found


def _work(stream: PairStream, index: PairIndex, worker: int, workers: int, batches: int, end: Connection) -> None:
    for number in range(batches):
        take(stream, index, worker + number * workers)
    end.send(own_memory())
    end.recv()


def main() -> None:
    """All of it, or, with `--measure`, the part that a process of its own does."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--pairs", type=int, default=5_000_000)
    arguments.add_argument("--batches", type=int, default=2_000)
    arguments.add_argument("--workers", type=int, default=4)
    arguments.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.measure:
        print(json.dumps(measure(given.folder, given.batches, given.workers)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder, started = Path(name), time.perf_counter()
        make(folder, given.pairs)
        made = time.perf_counter() - started
        size = sum(path.stat().st_size for path in (folder / "index").rglob("*") if path.is_file())
        command = [sys.executable, "-m", "benchmarks.index_memory", name, "--measure"]
        command += [f"--batches={given.batches}", f"--workers={given.workers}"]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(
        f"{given.pairs:,} pairs: written in {made:,.0f} s, {size / given.pairs:.0f} bytes a pair ({size / 1e9:.2f} GB)"
    )
    print(f"opened in {found['open_s']:.3f} s, and again in {found['again_s']:.3f} s")
    print(f"{found['pairs_of_expert']:,.0f} pairs chosen in {found['choose_s']:.0f} s, {found['choose_mb']:.0f} MB")
    print(f"{given.batches:,} batches of {BATCH}: {found['batch_ms']:.1f} ms each, {found['own_mb']:.0f} MB")
    print(f"each of {given.workers} workers: {found['worker_mb']:.0f} MB")


if __name__ == "__main__":
    main()
