"""Two processes under torchrun with gloo, against one process with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from mode.data.loading.selection import Pairs
from mode.data.shards.index import PairIndex
from mode.params import AdapterParams, ExpertParams, ImageParams, MachineParams, ModelParams, TrainingParams
from mode.roles import DENSE, EXPERT
from mode.training.loop import train
from mode.training.plan import Training, make_plan

ACCUMULATE = (1, 2)


def train_here(project: Path, model: ModelParams, out: Path, accumulate: int, parent: Path | None = None) -> None:
    """Train and write `losses.json` and the model folder; also what each process of torchrun runs.

    With a parent, an expert as an adapter of it.
    """
    recipe = TrainingParams(
        epoch_samples=24,
        epochs=4,
        seed_epochs=2,
        batch_size=12,
        accumulate=accumulate,
        warmup=2,
        lr=1e-3,
        adapter=AdapterParams(rank=4) if parent else None,
    )
    index = PairIndex.load(project / "index")
    role, expert = (EXPERT, ExpertParams(cluster=0)) if parent else (DENSE, None)
    plan = make_plan(
        role, Pairs.of(np.arange(len(index)), index.image), recipe, index.images, expert=expert, parent=parent
    )
    losses: dict[int, float] = {}
    clock = [time.monotonic()]

    def on_metrics(step: int, figures: dict[str, float]) -> None:
        losses[step] = figures["train/loss"]
        clock.append(time.monotonic())

    result = train(
        Training(plan, index, model, ImageParams(size=32, flip=True, shift=2), recipe, random_seed=3),
        project,
        machine=MachineParams(device="cpu", threads=1),
        checkpoint_dir=out / "checkpoints",
        on_metrics=on_metrics,
        log_every=1,
    )
    result.save(out / "model")
    if result.leads:
        out.mkdir(exist_ok=True)
        (out / "losses.json").write_text(json.dumps(losses))
        # From its first report on until the last but one it has trained; and all of it lay between its begin and now.
        (out / "between.json").write_text(json.dumps([clock[-2] - clock[1], time.monotonic() - clock[0]]))


def test_two_processes_have_the_loss_curve_of_one(
    project: Path, index: PairIndex, vit: ModelParams, tmp_path: Path
) -> None:
    """With a ViT: batch norm on a CPU sees its own process's share only. One start of torchrun for all cases."""
    assert index.images == 60
    for accumulate in ACCUMULATE:
        train_here(project, vit, tmp_path / f"one-{accumulate}", accumulate)
    seed = tmp_path / "one-1/model"
    train_here(project, vit, tmp_path / "one-adapter", 1, seed)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    given = [str(project), vit.model_dump_json(), str(tmp_path)]
    done = subprocess.run(
        [*command, *given], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2_000:]

    for accumulate in ACCUMULATE:
        folders = [tmp_path / f"{processes}-{accumulate}" for processes in ("one", "two")]
        one, two = (json.loads((folder / "losses.json").read_text()) for folder in folders)
        assert list(one) == list(two) == [str(step) for step in range(1, 9)]
        assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
        ours, theirs = (load_file(folder / "model" / "open_clip_model.safetensors") for folder in folders)
        for name in ours:
            np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-3, atol=1e-4)
        # What a card gives, to a thousandth, is the time of every process.
        for processes, folder in enumerate(folders, start=1):
            seconds = json.loads((folder / "model" / "card.json").read_text())["own"]["seconds"]
            least, most = json.loads((folder / "between.json").read_text())
            assert least - 0.001 <= seconds / processes <= most + 0.001

    one, two = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("one-adapter", "two-adapter"))
    assert list(one) == list(two) == ["5", "6", "7", "8"]
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    ours, theirs = (
        load_file(tmp_path / name / "model/adapter_model.safetensors") for name in ("one-adapter", "two-adapter")
    )
    for name in ours:
        np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    for passes in ACCUMULATE:
        model = ModelParams.model_validate_json(sys.argv[2])
        train_here(Path(sys.argv[1]), model, Path(sys.argv[3]) / f"two-{passes}", passes)
    train_here(Path(sys.argv[1]), model, Path(sys.argv[3]) / "two-adapter", 1, Path(sys.argv[3]) / "one-1/model")
