"""A training in a process of its own that is told to stop before its first step, and while its last copy is sent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from mode.data.glyphs.dataset import write_glyph_shards
from mode.data.shards.index import build_index
from mode.data.shards.manifest import build_manifest
from mode.params import GlyphParams, IndexParams, SourceParams
from mode.training.checkpoint import open_checkpoint
from tests.small import VIT
from tests.waiting import LONG, wait_until

STOPPED = "seed: stopped; the next run goes on from the last checkpoint, if there is one"

#: Has a training say where it is and stay there: as it imports a library, or calls a function of a module.
STAYING = """
import importlib, sys, threading
def stay(*_, **__):
    print("there", flush=True)
    threading.Event().wait()
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            stay()
sys.meta_path.insert(0, Finder())
if ":" in sys.argv[1]:
    module, _, function = sys.argv[1].partition(":")
    owner = importlib.import_module(module)
    *classes, name = function.split(".")
    for each in classes:
        owner = getattr(owner, each)
    setattr(owner, name, stay)
from mode.cli import main
from mode.tracking import runs
runs.FAREWELL_SECONDS = 1000.0
main(["stage", "seed"])
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an index of 64 pairs."""
    root = tmp_path_factory.mktemp("project")
    write_glyph_shards(GlyphParams(pairs=64, shard_pairs=64), root / "shards", random_seed=0, workers=1)
    build_index(build_manifest(SourceParams(shards="shards"), root), root, root / "data/index/base", IndexParams(), 1)
    return root


@pytest.fixture
def root(shards: Path, tmp_path: Path) -> Path:
    """A copy of it, whose seed is trained for a long time."""
    root = tmp_path / "project"
    shutil.copytree(shards, root)
    training = {"epoch_samples": 32, "epochs": 10_001, "seed_epochs": 10_000, "batch_size": 8, "warmup": 0}
    params = {
        "sources": {"base": {"shards": "glyphs"}},
        "experts": {"expert-0": {"cluster": 0}},
        "model": VIT.model_dump(exclude_none=True),
        "image": {"size": 16},
        "training": training,
        "machine": {"device": "cpu", "threads": 1, "checkpoint_minutes": 1e-9},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def started(root: Path, *command: str, **variables: str) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=root, env=os.environ | variables, **pipes)


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("torch", signal.SIGTERM),
        ("torch", signal.SIGINT),
        ("mode.training.loop:_Monitor.do_beside", signal.SIGTERM),
    ],
)
def test_a_training_that_has_not_begun_ends_at_once(root: Path, place: str, number: signal.Signals) -> None:
    with started(root, "-c", STAYING, place) as training:
        assert training.stdout is not None
        assert "there\n" in iter(training.stdout.readline, "")
        training.send_signal(number)
        _, said = training.communicate(timeout=LONG)
    assert (training.returncode, said.splitlines()[-1:]) == (128 + number, [STOPPED])
    assert "Traceback" not in said
    assert not list((root / "checkpoints").rglob("*.safetensors"))


def states(root: Path) -> list[str]:
    """How MLflow's runs are, once there is a database."""
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(root / "mlruns/mlflow.db")) as database:
        return [state for (state,) in database.execute("SELECT status FROM runs")]
    return []


def test_the_run_of_a_training_that_has_not_begun_is_over_when_it_has_ended(root: Path) -> None:
    with started(root, "-c", STAYING, "mode.training.loop:_Monitor.do_beside") as training:
        wait_until(lambda: states(root) == ["RUNNING"] or training.poll() is not None)
        training.send_signal(signal.SIGTERM)
        _, said = training.communicate(timeout=LONG)
    assert (training.returncode, said.splitlines()[-1:]) == (143, [STOPPED])
    assert states(root) == ["KILLED"]
    assert not list((root / "mlruns/pending").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_that_ends_after_its_last_step_loses_none(root: Path, number: signal.Signals) -> None:
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["training"] |= {"epochs": 4, "seed_epochs": 3}
    params["machine"] |= {"checkpoint_minutes": 1000.0}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    with started(root, "-c", STAYING, "mode.training.loop:make_card") as training:
        assert training.stdout is not None
        assert "there\n" in iter(training.stdout.readline, "")
        training.send_signal(number)
        training.communicate(timeout=LONG)
    assert not (root / "models").exists()
    [checkpoint] = root.rglob("checkpoint.safetensors")
    assert open_checkpoint(checkpoint, root / "models")[1] == 12

    with started(root, "-m", "mode.cli", "stage", "seed") as training:
        shown, said = training.communicate(timeout=LONG)
    assert training.returncode == 0, said
    assert "seed goes on from its checkpoint" in shown
    card = json.loads((root / "models/seed/card.json").read_text())
    assert (card["steps"], card["own"]["samples_seen"]) == ([0, 12], 96)
    assert not list(root.rglob("checkpoint.safetensors"))
    assert "RUNNING" not in states(root)


class Store(BaseHTTPRequestHandler):
    """Of S3: it has nothing, and says so unless `silent`; what is to be written is never answered.

    Attributes:
        asked: set when there is a request that is not answered.
    """

    silent, asked, ending = False, threading.Event(), threading.Event()

    def do_GET(self) -> None:
        if Store.silent:
            self._wait()
            return
        body = b"<ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _wait(self) -> None:
        Store.asked.set()
        Store.ending.wait(LONG)

    do_PUT = do_POST = do_HEAD = _wait

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Store]]:
    pytest.importorskip("s3fs")
    Store.silent = False
    Store.asked.clear()
    Store.ending.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("MODE_CHECKPOINT_URL", "s3://bucket/copies")
    yield Store
    Store.ending.set()
    server.shutdown()
    server.server_close()


def test_a_training_that_looks_for_a_copy_ends_at_once(root: Path, store: type[Store]) -> None:
    store.silent = True
    with started(root, "-m", "mode.cli", "stage", "seed") as training:
        wait_until(lambda: store.asked.is_set() or training.poll() is not None)
        training.send_signal(signal.SIGTERM)
        _, said = training.communicate(timeout=LONG)
    assert (training.returncode, said.splitlines()[-1:]) == (143, [STOPPED])


def test_a_last_copy_that_takes_too_long_is_given_up(root: Path, store: type[Store]) -> None:
    """The checkpoint is there, and the next run goes on from it."""
    with started(root, "-m", "mode.cli", "stage", "seed", MODE_STOP_SECONDS="0.5") as training:
        wait_until(lambda: list(root.rglob("checkpoint.safetensors")) or training.poll() is not None)
        training.send_signal(signal.SIGTERM)
        _, said = training.communicate(timeout=LONG)
    [checkpoint] = root.rglob("checkpoint.safetensors")
    assert training.returncode == 143, said
    assert store.asked.is_set()
    assert "seed: no time was left to copy step" in said
    assert re.search(
        rf"^seed: stopped after step [\d,]+ of 40,000; the next run goes on from {checkpoint}$", said, re.M
    )
