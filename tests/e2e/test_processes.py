"""One project in several processes: training under torchrun, stages with Dask, shards for another trainer."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml
from safetensors.numpy import load_file

from mode.cli import main
from mode.clustering.assignment import Assignment
from mode.data.loading.selection import expert_rows
from mode.data.shards.index import PairIndex
from mode.stages import run_stage
from tests.e2e.conftest import VIT, SmallProject, environment, make_project
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mode.cli"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallProject]:
    """A project with a seed, so that experts can be trained."""
    project = make_project(tmp_path_factory.mktemp("processes") / "project")
    params = project.params()
    params["glyphs"]["pairs"] = 600
    params["model"] = {"config": VIT, "tokenizer": "words", "vocabulary": 500}
    params["training"] |= {"epoch_samples": 320, "epochs": 7, "held_out": 40}
    params["training"]["validate"] = {"every": 20, "held_out": 40}
    params["machine"]["checkpoint_minutes"] = 1000
    project.set_params(params)
    for stage in ("data", "index", "embedder", "embed", "cluster", "assign", "seed"):
        key = None if stage in ("embedder", "seed") else "base"
        run_stage(stage, key, project.root, project.root / "params.yaml")
    yield project
    shutil.rmtree(project.root, ignore_errors=True)


def stage(project: SmallProject, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND` in the project; it has to succeed."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=project.root,
        env={**environment(), "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done


def curve(project: SmallProject, name: str, table: str = "curve.csv") -> list[tuple[int, float]]:
    with (project.root / "models" / name / table).open() as file:
        return [(int(row["samples"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_torchrun_gives_the_curve_of_one_process(small: SmallProject) -> None:
    root = small.root
    run_stage("expert", "expert-0", root, root / "params.yaml")
    one, weights = curve(small, "expert-0"), load_file(root / "models/expert-0/open_clip_model.safetensors")
    looks = curve(small, "expert-0", "validation.csv")
    journals = len(list((root / "mlruns").rglob("*.jsonl")))

    done = stage(small, *TORCHRUN, "stage", "expert", "expert-0")
    card = json.loads((root / "models/expert-0/card.json").read_text())
    assert card["provenance"]["processes"] == 2
    # The same 32 samples a step and the same random choices; only the order in which float32 sums are taken differs.
    two = curve(small, "expert-0")
    assert [samples for samples, _ in two] == [samples for samples, _ in one] == [1280, 1920, 2240]
    np.testing.assert_allclose([loss for _, loss in two], [loss for _, loss in one], atol=1e-4)
    for name, tensor in load_file(root / "models/expert-0/open_clip_model.safetensors").items():
        np.testing.assert_allclose(tensor, weights[name], rtol=1e-3, atol=1e-4, err_msg=name)
    # The first of them looks at the held-out pairs, while the other waits.
    seen = curve(small, "expert-0", "validation.csv")
    assert [samples for samples, _ in seen] == [samples for samples, _ in looks] == [960, 1280, 1920, 2240]
    np.testing.assert_allclose([loss for _, loss in seen], [loss for _, loss in looks], atol=1e-4)
    # One process reports and writes.
    assert done.stderr.count("expert-0: 1,280 of 1,280 samples") == 1
    assert not (root / "checkpoints/expert-0").exists()
    assert len(list((root / "mlruns").rglob("*.jsonl"))) == journals


def test_interrupted_processes_go_on_as_one(small: SmallProject, capsys: pytest.CaptureFixture[str]) -> None:
    root, number = small.root, signal.SIGINT
    params = small.params()
    # Long enough to be met while it runs, and a checkpoint that shows that it does.
    params["machine"]["checkpoint_minutes"] = 0.0001
    params["experts"]["expert-1"]["epochs"] = 10
    small.set_params(params)
    command = [sys.executable, "-m", "mode.cli", "stage", "expert", "expert-1"]
    training = subprocess.Popen(
        command,
        cwd=root,
        env={**environment(), "MODE_PROCESSES": "2", "MODE_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def has_begun() -> bool:
        assert training.poll() is None
        return any((root / "checkpoints/expert-1").glob("*/checkpoint.safetensors"))

    wait_until(has_begun)
    # As a terminal's Ctrl-C does: to the whole group. The processes that train hear of it from their parent.
    os.killpg(training.pid, number)
    _, said = training.communicate()
    assert training.returncode == 128 + number, said
    assert said.count("expert-1: stopped after step") == 1, said
    assert "Traceback" not in said, said

    params["machine"]["checkpoint_minutes"] = 1000
    small.set_params(params)
    run_stage("expert", "expert-1", root, root / "params.yaml")
    assert "expert-1 goes on from its checkpoint" in capsys.readouterr().out
    resumed = curve(small, "expert-1")
    run_stage("expert", "expert-1", root, root / "params.yaml")
    whole = curve(small, "expert-1")
    assert [samples for samples, _ in resumed] == [samples for samples, _ in whole]
    np.testing.assert_allclose([loss for _, loss in resumed], [loss for _, loss in whole], atol=1e-4)


def test_a_fault_in_several_processes_is_told_in_lines(small: SmallProject) -> None:
    params = small.params()
    params["training"]["batch_size"] = 33
    params["training"]["epoch_samples"] = 330
    (small.root / "odd.yaml").write_text(yaml.safe_dump(params))
    done = subprocess.run(
        [sys.executable, "-m", "mode.cli", "stage", "seed", "--params", "odd.yaml"],
        cwd=small.root,
        env={**environment(), "MODE_PROCESSES": "2", "MODE_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "training.batch_size (33) is not a multiple of processes x accumulate (2 x 1)" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_long_ranges_in_several_processes_and_machines(small: SmallProject) -> None:
    """Interrupted and gone on with, two processes end with the same bytes; two machines have the losses of one."""
    root, weights = small.root, small.root / "models/expert-1/open_clip_model.safetensors"
    before, params = (root / "params.yaml").read_text(), small.params()
    params["training"] |= {"read": "sequential", "shuffle_images": 300}
    params["machine"] |= {"checkpoint_minutes": 1000, "cache_mb": 0}
    params["experts"]["expert-1"]["epochs"] = 12  # long enough to be met while it runs
    small.set_params(params)
    alone, expert = {"MODE_THREADS": "1", "MODE_WORKERS": "0"}, ["-m", "mode.cli", "stage", "expert", "expert-1"]
    try:
        stage(small, *TORCHRUN, "stage", "expert", "expert-1", **alone)
        whole, losses = weights.read_bytes(), curve(small, "expert-1")

        training = subprocess.Popen(
            [sys.executable, *expert],
            cwd=root,
            env={**environment(), **alone, "MODE_PROCESSES": "2", "MODE_CHECKPOINT_MINUTES": "0.0001"},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_until(lambda: list(root.glob("checkpoints/expert-1/*/checkpoint.safetensors")) or training.poll())
        os.killpg(training.pid, signal.SIGINT)
        _, said = training.communicate()
        assert training.returncode == 128 + signal.SIGINT, said
        assert "expert-1: stopped after step" in said
        stage(small, *TORCHRUN, "stage", "expert", "expert-1", **alone)
        assert weights.read_bytes() == whole

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
        machines = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *meeting, "--node-rank", str(number), *expert],
                cwd=root,
                env={**environment(), **alone, "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        said_by = [machine.communicate()[1] for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], said_by
        both = curve(small, "expert-1")
        assert [samples for samples, _ in both] == [samples for samples, _ in losses]
        np.testing.assert_allclose([loss for _, loss in both], [loss for _, loss in losses], atol=1e-4)
    finally:
        (root / "params.yaml").write_text(before)


def test_stages_with_dask_write_the_same_files(small: SmallProject) -> None:
    files = [Path("data/vectors/base.npy"), Path("data/assignment/base.parquet")]
    before = [(small.root / file).read_bytes() for file in files]
    for file, name in zip(files, ("embed", "assign"), strict=True):
        (small.root / file).unlink()
        done = stage(small, "-m", "mode.cli", "stage", name, "base", MODE_ENGINE="dask", MODE_THREADS="2")
        assert "dask: 2 workers" in done.stderr
    assert [(small.root / file).read_bytes() for file in files] == before


def test_an_exported_expert_is_what_it_is_trained_on(small: SmallProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small.root)
    with pytest.raises(SystemExit) as ended:
        main(["export-shards", "expert-1", "exported", "--pairs-per-shard", "100"])
    assert not ended.value.code
    tars = sorted(str(path) for path in (small.root / "exported").glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    origins = [json.loads(sample["json"]) for sample in samples]
    params, assignment = small.params(), Assignment.load(small.root / "data/assignment/base.parquet")
    share, random_seed = params["branch"]["outside_share"], params["random_seed"]
    rows = np.concatenate([*expert_rows(lambda: iter([assignment.coarse]), 1, share, random_seed)])
    assert [origin["pair"] for origin in origins] == rows.tolist()
    assert {origin["coarse"] for origin in origins} == {0, 1}
    captions = PairIndex.load(small.root / "data/index/base").captions(rows)
    assert [sample["txt"].decode() for sample in samples] == captions
