"""Memory does not grow with the number of pairs: of a training, and of the indexing of a table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import table_memory
from benchmarks.index_memory import make

#: Bytes of a pair that each held in memory would go beyond, at the least: a number of 8 bytes.
HELD = 8
#: Bytes of a row of a table, whose text alone has more: a table that is held takes 360.
ROW = 100


def own_memory(folder: Path, pairs: int) -> dict[str, float]:
    """Megabytes, in a process of its own, so that nothing that another test has left behind counts."""
    folder.mkdir()
    make(folder, pairs)
    command = [sys.executable, "-m", "benchmarks.index_memory", str(folder), "--measure", "--batches=60", "--workers=2"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_ten_times_the_pairs_take_no_more_memory(tmp_path: Path) -> None:
    few, many = (own_memory(tmp_path / f"{pairs}", pairs) for pairs in (200_000, 2_000_000))
    grown = {key: many[key] - few[key] for key in ("own_mb", "worker_mb")}
    assert max(grown.values()) < 1_800_000 * HELD / 1e6, (few, many)
    assert many["worker_mb"] < 50


def memory_of_indexing(folder: Path, rows: int) -> dict[str, float]:
    """Megabytes at most, in a process of its own."""
    folder.mkdir()
    table_memory.make(folder, rows)
    command = [sys.executable, "-m", "benchmarks.table_memory", str(folder), "--measure"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_ten_times_the_rows_of_a_table_take_no_more_memory(tmp_path: Path) -> None:
    """Nor ten times as many that are bad: a tenth of them is."""
    few, many = (memory_of_indexing(tmp_path / f"{rows}", rows) for rows in (20_000, 200_000))
    assert many["pairs"] == 10 * few["pairs"] == 180_000
    assert many["bad"] == 10 * few["bad"] == 20_000
    assert many["grown_mb"] - few["grown_mb"] < 180_000 * ROW / 1e6, (few, many)
