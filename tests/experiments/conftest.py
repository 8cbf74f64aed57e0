"""Two made-up experiments with results and one without, in a project's folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mode.experiments.table import SCHEMA
from mode.paths import Paths

LENGTH = """
title: Length of training
question: Where do the lines cross?
note: Once is the demo's training.
runs: {x1: {}, x8: {}}
rows:
  dense 1x: [x1, dense]
  MoDE 1x: [x1, ensemble]
  dense 8x: [x8, dense]
  MoDE 8x: [x8, ensemble]
compare:
  - {row: MoDE 1x, than: dense 1x, expect: better}
  - {row: MoDE 8x, than: dense 8x, expect: better}
  - {row: MoDE 8x, than: dense 1x}
figure: {x: {x1: 1, x8: 8}, label: length, lines: {MoDE: ensemble, dense: dense}, log: true}
"""
RETRIEVAL = """
title: Retrieval
question: Is retrieval won?
item: Table 4
seeds: [0]
runs: {m: {}}
rows: {dense: [m, dense], MoDE-4: [m, ensemble]}
metrics: [zero-shot, flickr image_recall@1]
compare: [{row: MoDE-4, than: dense, expect: better, paper: 43.1 against 41.4}]
figure: {}
"""
WAITING = """
title: Number of experts
question: Does accuracy grow with n?
item: Figure 3
runs: {n2: {experts: 2}}
rows: {MoDE-2: [n2, ensemble]}
"""
#: The mean of each arm in hundredths, by run; `chess` is a point above it and `cards` a point below.
MEANS = {"x1": {"dense": 50, "ensemble": 47}, "x8": {"dense": 60, "ensemble": 62}, "m": {"dense": 50, "ensemble": 52}}
COMMIT = "3f2a9c1d0b7e4f5a6c8d9e0f1a2b3c4d5e6f7a8b"


def lines_of(name: str, runs: Iterable[str], seeds: Iterable[int], recall: bool = False) -> pd.DataFrame:
    """A table of results. A random seed adds its tenth of a point to both arms, and a hundredth to the ensemble."""
    lines = []
    for run in runs:
        for seed in seeds:
            for arm, mean in MEANS[run].items():
                samples = 1_000.0 * (8 if run == "x8" else 1) * (1.5 if arm == "ensemble" else 1)
                cost = (samples, 1e6 * samples, samples / 10, 4.0 if arm == "ensemble" else 1.0, COMMIT, "2 cores")
                value = mean + 0.1 * seed + (0.01 * seed if arm == "ensemble" else 0)
                tasks = [("chess", "acc1", value + 1), ("cards", "acc1", value - 1)]
                tasks += [("flickr", "image_recall@1", value / 2), ("flickr", "text_recall@1", 0.0)] if recall else []
                lines += [(name, run, seed, arm, task, metric, found / 100, *cost) for task, metric, found in tasks]
    return pd.DataFrame(lines, columns=SCHEMA.names)


def save(folder: Path, frame: pd.DataFrame, schema: pa.Schema = SCHEMA) -> Path:
    """Write a table and its record; returns the table's path."""
    name = "other" if frame.empty else str(frame["experiment"].iloc[0])
    path = folder / f"{name}.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pandas(frame, schema, preserve_index=False), path)
    record = {"commit": COMMIT, "command": f"mode experiment {name}", "runs": {"m": {"random_seed": 0}}}
    path.with_suffix(".json").write_text(json.dumps(record))
    return path


def make_project(root: Path) -> Paths:
    paths = Paths(root)
    paths.experiments.mkdir(parents=True)
    for name, text in (("length", LENGTH), ("retrieval", RETRIEVAL), ("waiting", WAITING)):
        (paths.experiments / f"{name}.yaml").write_text(text)
    save(paths.experiment_results, lines_of("length", ["x1", "x8"], [0, 1, 2]))
    save(paths.experiment_results, lines_of("retrieval", ["m"], [0], recall=True))
    return paths


@pytest.fixture
def project(tmp_path: Path) -> Paths:
    """For a test to change."""
    return make_project(tmp_path / "project")
