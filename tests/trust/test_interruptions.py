"""Long runs: interrupted again and again, a training sees every sample exactly once an epoch, and ends the same.

By default a few interruptions; with `--full` fifty of each kind. `--seed N` chooses other steps.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from mode.clip.folder import WEIGHTS
from mode.data.shards.index import PairIndex
from tests.killing import KILL, TERM, served
from tests.trust import recorded
from tests.trust.recorded import each_once_an_epoch, seen, train_recorded

pytestmark = pytest.mark.e2e  # real stages, again and again

#: Batches beyond the end of any training here.
NEVER = 10**6


@pytest.fixture
def root(finished: Path, tmp_path: Path, full: bool) -> Path:
    """A project whose seed has 45 steps to go, three passes; or 300. It is looked at every fourth step."""
    made = tmp_path / "project"
    made.mkdir()
    for name in ("data/shards", "data/index", "data/tasks/chess"):
        shutil.copytree(finished / name, made / name)
    params = yaml.safe_load((finished / "params.yaml").read_text())
    epochs = 20 if full else 3
    params["training"] |= {"epoch_samples": 120, "batch_size": 8, "seed_epochs": epochs, "epochs": epochs + 1}
    params["training"]["validate"] = {"every": 4, "tasks": ["chess"]}
    (made / "params.yaml").write_text(yaml.safe_dump(params))
    return made


@pytest.fixture
def images(root: Path) -> np.ndarray:
    return PairIndex.load(root / "data/index/base").image[:]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_sample_once_an_epoch_whatever_interrupts(
    root: Path, images: np.ndarray, tmp_path: Path, workers: int, seed: int, full: bool
) -> None:
    whole, random = tmp_path / "whole", np.random.default_rng([seed, workers])
    shutil.copytree(root, whole)
    assert served(partial(train_recorded, whole, tmp_path / "once", 0, NEVER, TERM)) == 0
    expected = seen(tmp_path / "once")
    assert each_once_an_epoch(expected, images)

    wanted, interruptions = (50, 0) if full else (2, 0)
    code = -1
    while code:
        # Each goes a few steps: some are killed, and go on from the checkpoint before; some are told to stop.
        number = KILL if random.random() < 0.5 else TERM
        steps = int(random.integers(2, 10)) if interruptions < wanted else NEVER
        code = served(partial(train_recorded, root, tmp_path / "notes", workers, steps, number))
        assert code in (0, -KILL, 128 + TERM)
        interruptions += code != 0
    assert interruptions >= wanted
    assert seen(tmp_path / "notes") == expected
    for name in (WEIGHTS, "validation.csv"):
        assert (root / "models/seed" / name).read_bytes() == (whole / "models/seed" / name).read_bytes()


def test_the_same_with_two_processes(root: Path, images: np.ndarray, tmp_path: Path, seed: int, full: bool) -> None:
    """All are told to stop when one is; torchrun ends the others when one is killed."""
    random = np.random.default_rng([seed, 2])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    interruptions, wanted, code = 0, 50 if full else 1, -1
    while code:
        steps = int(random.integers(3, 9)) if interruptions < wanted else NEVER
        number = KILL if full and random.random() < 0.5 else TERM
        given = [str(root), str(tmp_path / "notes"), "0", str(steps), str(int(number))]
        done = subprocess.run(
            [*command, str(recorded.__file__), *given],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        code = done.returncode
        assert code == 0 or interruptions < wanted, done.stderr[-2000:]
        interruptions += code != 0
    assert interruptions == wanted
    rows = seen(tmp_path / "notes", processes=2)
    assert each_once_an_epoch(rows, images)
    assert len(rows) == 120 * (20 if full else 3)
