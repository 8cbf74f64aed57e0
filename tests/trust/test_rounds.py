"""Long runs: round after round of all stages in one process, and nothing grows: no memory, no file, no open one.

By default a few rounds; with `--full` an hour of them. MLflow's database grows by the runs that are added, and by
nothing else.
"""

from __future__ import annotations

import gc
import json
import os
import sqlite3
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.killing import served
from tests.trust import tiny

pytestmark = pytest.mark.e2e  # real stages, again and again

#: Rounds until caches are full and every library is there.
WARM = 1
#: MB that may come and go by themselves: what an allocator keeps.
SLACK = 30


def test_rounds_leave_nothing_behind(project: Path, tmp_path: Path, full: bool) -> None:
    notes, temporary = tmp_path / "notes.json", tmp_path / "temporary"
    temporary.mkdir()
    assert served(partial(rounds, project, notes, temporary, 3600.0 if full else 0.0, WARM + 2)) == 0
    seen = json.loads(notes.read_text())
    assert len(seen) > WARM
    first, last = seen[WARM], seen[-1]
    for what in ("files", "temporary"):
        assert last[what] == first[what], what
    for what in ("descriptors", "threads"):  # some are closed when Python gets round to it
        assert last[what] <= first[what], what
    assert last["memory"] < first["memory"] + SLACK, [each["memory"] for each in seen]
    added = len(seen) - 1 - WARM
    # Each round makes models of its own: four that are trained, the two that are derived, and an ensemble to serve.
    assert last["runs"] == first["runs"] + 6 * added
    assert last["versions"] == first["versions"] + added
    assert last["database"] <= first["database"] * (1 + added)


def rounds(root: Path, notes: Path, temporary: Path, seconds: float, least: int) -> None:
    """All stages, again and again, until the time is over; what there is after each round goes to `notes`."""
    tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
    began, seen = time.monotonic(), []
    while len(seen) < least or time.monotonic() - began < seconds:
        for name, key in tiny.STAGES:
            tiny.stage(root, name, key)
        seen.append(state(root, temporary))
        notes.write_text(json.dumps(seen))


def state(root: Path, temporary: Path) -> dict[str, object]:
    """What there is: files of the project (but for MLflow's artifacts of each run), memory in MB, MLflow's rows."""
    gc.collect()
    process = psutil.Process()
    below = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    with sqlite3.connect(root / "mlruns/mlflow.db") as database:
        [[runs]] = database.execute("select count(*) from runs")
        [[versions]] = database.execute("select count(*) from model_versions")
    return {
        "files": sorted(path for path in below if not path.startswith("mlruns/")),
        "temporary": sorted(str(path) for path in temporary.rglob("*")),
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "memory": process.memory_info().rss / 2**20,
        "runs": runs,
        "versions": versions,
        "database": (root / "mlruns/mlflow.db").stat().st_size,
    }
