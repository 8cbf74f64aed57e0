"""What holds for all tests: no network, and one thread per process, for the processes are no fewer than the cores."""

from __future__ import annotations

import os

# Read when numpy and torch are imported: before them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DO_NOT_TRACK", "true")

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from mode.clip.model import build_model, save_model
from mode.embedding.lsa import LsaEmbedder
from mode.ensemble.router import Router, images_to_keep
from mode.params import ImageParams, ModelParams, RoutingParams
from mode.processes import collect_rarely

# A shell ignores SIGINT for what it runs in the background, and whatever that starts inherits this; the tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A tenth of the time of tests of the models.
collect_rarely()

# A busy machine is no fault of what is tested.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--seed` gives the fuzzers other damages, `--full` all the time that they could use."""
    parser.addoption("--seed", type=int, default=0, help="of the fuzzers under tests/trust")
    parser.addoption("--full", action="store_true", help="all that the fuzzers under tests/trust can do: takes hours")


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """What `--seed` says."""
    given: int = request.config.getoption("--seed")
    return given


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether `--full` was given."""
    given: bool = request.config.getoption("--full")
    return given


CAPTIONS = ["white chess king", "black chess rook", "red queen", "ace of hearts", "two of spades", "ten of clubs"] * 3
MODEL = ModelParams(
    config={
        "embed_dim": 16,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    },
    tokenizer="words",
)


@pytest.fixture(scope="session")
def small_ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `models/`, two untrained experts and their ensemble, and three images: to be copied."""
    root = tmp_path_factory.mktemp("ensemble")
    random = np.random.default_rng(0)
    for number, name in enumerate(("expert-0", "expert-1")):
        save_model(root / "models" / name, build_model(MODEL, ImageParams(size=32), CAPTIONS, number), {})
    embedder = LsaEmbedder.fit(CAPTIONS, 4, 0)
    conditions = {"expert-0": embedder.encode(CAPTIONS[:3]), "expert-1": embedder.encode(CAPTIONS[3:6])}
    fitted = Router.fit(conditions, embedder, RoutingParams(), CAPTIONS, 0)
    kept = {
        name: random.integers(0, 255, (min(40, images_to_keep(2, 32)), 3, 32, 32), dtype=np.uint8)
        for name in conditions
    }
    Router(conditions, embedder, fitted.routing, fitted.temperature, kept).save(root / "models/ensemble")
    for name in ("king", "ace", "rook"):
        Image.fromarray(random.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(root / f"{name}.png")
    return root


@pytest.fixture
def folder(small_ensemble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `models/` and the images that the examples speak of, to work in."""
    shutil.copytree(small_ensemble, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
