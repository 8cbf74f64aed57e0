"""`mode predict` and the page of `mode app`, without a browser: what they say is what the ensemble says."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from gradio import Error
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import mode
from mode.app import _answer, ask_ensemble, build
from mode.cli import main
from mode.errors import ModeError

CLASSES = ["white chess king", "ace of hearts", "red queen"]


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (height, width), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    printed = capsys.readouterr()
    return int(str(ended.value.code or 0)), printed.out, printed.err


def test_predictions_as_json_are_those_of_the_library(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        *(
            capsys,
            "predict",
            "--classes",
            " white chess king, ace of hearts ,red queen",
            "--template",
            "a picture of {c}",
        ),
        *("--json", "king.png", "ace.png"),
    )
    assert code == 0
    given = json.loads(out)
    task = mode.load("models").adapt(CLASSES, ["a picture of {c}"])
    assert given["weights"] == pytest.approx(task.weights)
    for row, name, expected in zip(
        given["predictions"], ("king.png", "ace.png"), task(["king.png", "ace.png"]), strict=True
    ):
        assert row["image"] == name
        assert list(row["probabilities"]) == CLASSES
        assert list(row["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
        assert row["label"] == CLASSES[int(expected.argmax())]


def test_predictions_as_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "predict", "--classes", ",".join(CLASSES), "--top-k", "1", "king.png")
    assert code == 0
    [line] = [line for line in out.splitlines() if "king.png" in line]
    assert all(name in line for name in CLASSES)
    assert out.count("expert-") == 1
    assert "1.00" in out


def test_a_folder_of_images_and_a_file_of_classes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mode.cli._AT_ONCE", 2)  # the bar's steps must not show in the answers
    classes = [*CLASSES[:2], "queen, red"]  # a comma is part of a name there
    Path("classes.txt").write_text("\ufeff" + "\n\n".join(classes) + "\n", encoding="utf-8")
    Path("scans").mkdir()
    for number, name in enumerate(("b.PNG", "a.jpg", "c.webp")):
        pixels = np.full((20, 30, 3), 80 * number, np.uint8)
        Image.fromarray(pixels).save(Path("scans") / name)
    Path("scans/notes.txt").write_text("no image")
    code, out, err = run(capsys, "predict", "--classes-file", "classes.txt", "--json", "scans", "king.png")
    assert code == 0
    assert "4 images" in err
    rows = json.loads(out)["predictions"]
    files = ["scans/a.jpg", "scans/b.PNG", "scans/c.webp", "king.png"]
    assert [row["image"] for row in rows] == files
    expected = mode.load("models").adapt(classes)(files)
    for row, each in zip(rows, expected, strict=True):
        assert row["probabilities"] == pytest.approx(dict(zip(classes, each.tolist(), strict=True)), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--classes", "a,b", "nowhere.png"), "nowhere.png: cannot be read"),
        (("--classes", "a,,b", "king.png"), "none of them empty"),
        (("--classes", "a", "--template", "no place", "king.png"), "has no {c}"),
        (("--classes", "a,b", "--models", "nowhere", "king.png"), "nowhere: no ensemble there"),
        (("--classes", "a,b, a", "king.png"), "--classes: 'a' is named twice"),
        (("--classes-file", "twice.txt", "king.png"), "--classes-file: 'a, b' is named twice"),
        (("--classes-file", "nowhere.txt", "king.png"), "nowhere.txt: cannot be read"),
        (("--classes-file", "king.png", "king.png"), "king.png: cannot be read"),
        (("--classes-file", "twice.txt", "--classes", "a", "king.png"), "give one of the two"),
        (("king.png",), "give one of the two"),
        (("--classes", "a,b", "models"), "models: no images in this folder"),
    ],
)
def test_wrong_input_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    Path("twice.txt").write_text("a, b\nc\n  a, b\n")
    code, _, err = run(capsys, "predict", *arguments)
    assert code == 1
    [line] = err.strip().splitlines()
    assert message in line


def test_the_page_shows_each_experts_opinion(folder: Path) -> None:
    ensemble = mode.load("models")
    image = Image.open("king.png")
    answer, rows = ask_ensemble(ensemble, image, CLASSES, ["a picture of {c}"])
    task = ensemble.adapt(CLASSES, ["a picture of {c}"])
    assert answer == pytest.approx(dict(zip(CLASSES, task(image)[0].tolist(), strict=True)))
    assert [row[0] for row in rows] == ["expert-0", "expert-1"]
    assert [row[1] for row in rows] == pytest.approx(list(task.weights.values()), abs=1e-3)
    for row in rows:
        own = task.opinions(image)[row[0]][0]
        assert row[2] == CLASSES[int(own.argmax())]
        assert row[3] == pytest.approx(100 * float(own.max()), abs=0.06)
    with pytest.raises(ModeError, match="at least one name"):
        ask_ensemble(ensemble, image, [], ["{c}"])


def test_the_page_asks_its_ensemble(folder: Path) -> None:
    """Over HTTP, as a browser does: with what is typed, tidied, and a fault as a sentence."""
    ensemble = mode.load("models")
    expected, opinions = ask_ensemble(ensemble, Image.open("king.png"), CLASSES, ["a picture of {c}"])
    page = build(ensemble)
    _, address, _ = page.launch(server_name="127.0.0.1", share=False, quiet=True, prevent_thread_lock=True)
    try:
        ask = partial(Client(address, verbose=False).predict, handle_file("king.png"), api_name="/ask")
        typed = f"\n {CLASSES[0]} \n\n{CLASSES[1]}\n{CLASSES[2]}\n{CLASSES[0]}\n"
        answer, table = ask(typed, "a picture of {c}\n")
        assert {said["label"]: said["confidence"] for said in answer["confidences"]} == pytest.approx(expected)
        assert table["data"] == opinions
        with pytest.raises(AppError, match="at least one name"):
            ask("", "{c}")
        with pytest.raises(AppError, match="At most 1000 classes"):
            ask("\n".join(map(str, range(1001))), "{c}")
    finally:
        page.close()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EOF\n", "The image: none of JPEG, PNG, WEBP"),
        (png(1, 20_000), "The image: 1 x 20000 pixels, longer than 50 times the shorter side"),
        (png(10_000, 6_000), "The image: 10000 x 6000 pixels, more than 50,000,000"),
        (png(400, 400)[:300], "image 0: cannot be decoded"),
        (None, "The image is no longer there"),
    ],
)
def test_an_odd_upload_is_a_sentence(folder: Path, content: bytes | None, reason: str) -> None:
    upload = folder / "upload"
    if content is not None:
        upload.write_bytes(content)
    with pytest.raises(Error, match=reason):
        _answer(mode.load("models"), str(upload), "king", "{c}")
