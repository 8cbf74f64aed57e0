"""The registered ensemble behind `mlflow models serve` and `mode serve`, asked over HTTP."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page as Tab

import mode
from mode.clip.model import build_model, save_model
from mode.embedding.base import build_embedder
from mode.ensemble.router import Router
from mode.params import EmbeddingParams, ImageParams, RoutingParams
from mode.tracking.runs import Tracker
from tests.e2e.intruder import intrude
from tests.small import VIT
from tests.waiting import wait_until

pytestmark = pytest.mark.e2e

CAPTIONS = ["white chess king", "black chess rook", "red queen", "ace of hearts", "two of spades", "ten of clubs"] * 3
CLASSES = ["white king", "ace of hearts", "black rook"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two untrained experts, registered as the champion."""
    root = tmp_path_factory.mktemp("served")
    for number, name in enumerate(("expert-0", "expert-1")):
        save_model(root / "models" / name, build_model(VIT, ImageParams(size=16), CAPTIONS, number), {})
    embedder = build_embedder(EmbeddingParams(dimensions=4), CAPTIONS, 0)
    conditions = {"expert-0": embedder.encode(CAPTIONS[:3]), "expert-1": embedder.encode(CAPTIONS[3:6])}
    Router.fit(conditions, embedder, RoutingParams(), CAPTIONS, 0).save(root / "models/ensemble")
    folders = {name: root / "models" / name for name in conditions}
    Tracker(root / "mlruns").register_ensemble(root / "models/ensemble", folders)
    return root


@pytest.fixture(scope="module")
def address(models: Path) -> Iterator[str]:
    """Where MLflow's own server answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "mlflow", "models", "serve", "-m", "models:/mode-ensemble@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    with served(models, command) as server:

        def answers() -> bool:
            assert server.poll() is None, (models / "server.log").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping"):
                return True
            return False

        wait_until(answers, (models / "server.log").read_text)
        yield f"http://127.0.0.1:{port}/invocations"


@pytest.fixture(scope="module")
def behind_the_door(models: Path) -> Iterator[str]:
    """Where `mode serve` answers."""
    with served(models, ["-m", "mode.cli", "serve", "--port", "0"]) as server:
        log = models / "server.log"

        def said() -> bool:
            assert server.poll() is None, log.read_text()
            return "POST http" in log.read_text()

        wait_until(said, log.read_text)
        yield log.read_text().partition("POST ")[2].split()[0]


@contextlib.contextmanager
def served(models: Path, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own."""
    # The package comes from the model's own copy, as on a machine that has no other.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLFLOW_"))}
    environment = {
        **kept,
        "MLFLOW_TRACKING_URI": Tracker(models / "mlruns").uri,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    if "mode.cli" in command:
        environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    with (models / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def ask(address: str, images: list[Any], **params: Any) -> tuple[int, Any]:
    """Status and answer."""
    body = {"dataframe_split": {"columns": ["image"], "data": [[image] for image in images]}, "params": params}
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def png(seed: int, size: int = 20) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size + 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_the_answer_is_that_of_the_loaded_model(models: Path, address: str) -> None:
    status, answer = ask(address, [encoded(png(0)), encoded(png(1))], classes=CLASSES, templates=["a {c}"])
    assert status == 200
    task = mode.load(models / "models", device="cpu").adapt(CLASSES, ["a {c}"])
    expected = task([png(0), png(1)]).numpy()
    found = np.array([row["probabilities"] for row in answer["predictions"]])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert [row["label"] for row in answer["predictions"]] == task.labels([png(0), png(1)])


def test_the_door_changes_no_answer(address: str, behind_the_door: str) -> None:
    given = [encoded(png(0)), encoded(png(1))]
    assert ask(behind_the_door, given, classes=CLASSES) == ask(address, given, classes=CLASSES)
    assert ask(behind_the_door, given)[0] == 400


def test_a_request_that_fills_the_memory_is_not_read(behind_the_door: str) -> None:
    place = urlsplit(behind_the_door)
    connection = http.client.HTTPConnection(place.netloc)
    connection.putrequest("POST", place.path)
    connection.putheader("Content-Length", str(33 * 2**20))
    connection.endheaders()
    assert connection.getresponse().status == 413  # before a byte of it is sent


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_no_page_asks(behind_the_door: str, tab: Tab) -> None:
    body = {"dataframe_split": {"columns": ["image"], "data": [[encoded(png(0))]]}, "params": {"classes": ["a"]}}
    intrude(tab, behind_the_door.removesuffix("/invocations"), "/version", "/invocations", json.dumps(body))


def test_a_thousand_classes_are_answered(address: str) -> None:
    status, answer = ask(address, [encoded(png(0))], classes=[f"king {number}" for number in range(1000)])
    assert status == 200
    assert len(answer["predictions"][0]["probabilities"]) == 1000


def bomb() -> bytes:
    """100 million black pixels in a file of some kilobytes."""
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("images", "params", "reason"),
    [
        ([encoded(png(0))], {}, "classes: the list is empty"),
        ([encoded(png(0))], {"classes": []}, "classes: the list is empty"),
        ([encoded(png(0))], {"classes": ["a", ""]}, "none of them empty"),
        ([encoded(png(0))], {"classes": ["a"], "templates": ["photo"]}, "has no {c}"),
        ([encoded(png(0))], {"classes": "dog"}, "classes"),
        ([encoded(png(0))], {"classes": [f"king {n}" for n in range(3000)]}, "3,000, more than 1,000"),
        ([], {"classes": ["a"]}, "image: there is none"),
        (["?!"], {"classes": ["a"]}, "image 0: not base64"),
        ([encoded(b"text")], {"classes": ["a"]}, "image 0: none of JPEG, PNG, WEBP"),
        ([encoded(png(0)), encoded(png(1)[:400])], {"classes": ["a"]}, "image 1: cannot be decoded"),
        ([encoded(bomb())], {"classes": ["a"]}, "image 0: 10000 x 10000 pixels, more than 50,000,000"),
        (["A" * 30_000_000], {"classes": ["a"]}, "image 0: larger than 20 MiB"),
    ],
)
def test_a_bad_request_is_a_400_with_a_reason(
    address: str, images: list[Any], params: dict[str, Any], reason: str
) -> None:
    status, answer = ask(address, images, **params)
    assert status == 400, answer
    assert reason in answer["message"]


def test_no_column_and_no_json_are_400(address: str) -> None:
    for body in (b'{"dataframe_split": {"columns": ["picture"], "data": [["x"]]}}', b"{", b"{}"):
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == 400
