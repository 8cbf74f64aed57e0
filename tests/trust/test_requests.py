"""Requests that nobody means well: each is answered or refused in one line, and none keeps memory."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import mode
from mode.ensemble.model import Ensemble
from mode.ensemble.request import read_request
from mode.errors import ModeError

#: Requests; `MODE_ODD_REQUESTS=10000 pytest tests/trust/test_requests.py` takes an hour.
COUNT = int(os.environ.get("MODE_ODD_REQUESTS", "40"))
#: MiB that the process may have grown by at the end, since its first requests.
GROWTH = 100
MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16")


@pytest.fixture(scope="module")
def ensemble(small_ensemble: Path) -> Ensemble:
    return mode.load(small_ensemble / "models", device="cpu")


class Intruder:
    """Draws odd requests."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def images(self) -> list[object]:
        """Of one request: up to nine, mostly of the same kind."""
        kinds = (self.plain, self.plain, self.empty_area, self.thin, self.cut, self.lie, self.noise, self.no_text)
        kind = kinds[self.random.integers(len(kinds))]
        return [kind() for _ in range(self.random.integers(2 if kind == self.empty_area else 10))]

    def params(self) -> dict[str, object]:
        """Classes and templates, seldom wrong."""
        classes: list[object] = [["king", "ace"], ["a"] * 1000, ["", "a"], [], "king", None, ["\ud800", "\0"], [["a"]]]
        templates: list[object] = [None, ["{c}"], ["a {c}", "{c}{c}"], ["none"], ["{c:>99999999}"], "{c}"]
        good = self.random.random() < 0.7
        return {
            "classes": classes[0 if good else self.random.integers(len(classes))],
            "templates": templates[0 if good else self.random.integers(len(templates))],
        }

    def plain(self) -> str:
        width, height = self.random.integers(1, 400, 2)
        return self._encoded(int(width), int(height))

    def empty_area(self) -> str:
        """A few kilobytes of up to fifty million pixels."""
        return self._encoded(*(int(side) for side in self.random.integers(500, 7100, 2)))

    def thin(self) -> str:
        return self._encoded(int(self.random.integers(1, 4)), int(self.random.integers(1, 65_000)))

    def cut(self) -> str:
        content = base64.b64decode(self.plain())
        return base64.b64encode(content[: self.random.integers(len(content))]).decode()

    def lie(self) -> str:
        """A PNG of a few bytes that says it has that many pixels."""

        def chunk(kind: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

        sides = (int(2 ** self.random.uniform(0, 31)) for _ in range(2))
        depth, colour = self.random.choice([1, 2, 8, 16, 255]), self.random.choice([0, 2, 3, 4, 6, 9])
        header = struct.pack(">IIBBBBB", *sides, depth, colour, 0, 0, 0)
        parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        return base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()

    def noise(self) -> str:
        start = self.random.choice([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF....WEBP", b"%!PS-Adobe-3.0"])
        return base64.b64encode(start + self.random.bytes(self.random.integers(2000))).decode()

    def no_text(self) -> object:
        return [None, 3, "", "?!", "data:image/png;base64,", ["a"], float("nan"), "A" * 30_000_000][
            self.random.integers(8)
        ]

    def _encoded(self, width: int, height: int) -> str:
        file = io.BytesIO()
        kind = str(self.random.choice(MODES))
        image = Image.new(kind, (width, height))
        if kind == "CMYK":
            image.save(file, "JPEG")
        elif kind in ("RGB", "RGBA") and max(width, height) < 2000 and self.random.random() < 0.5:
            image.save(file, "WEBP")
        else:
            image.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()


def test_odd_requests_are_answered_in_a_line_and_leave_no_memory(ensemble: Ensemble, seed: int) -> None:
    intruder, process = Intruder(seed), psutil.Process()
    answered, started = 0, 0
    refused: list[str] = []
    for number in range(COUNT):
        images, params = intruder.images(), intruder.params()
        try:
            request = read_request(images, params)
            task = ensemble.adapt(request.classes, request.templates)
            probabilities = task(request.images)
        except ModeError as error:
            refused.append(str(error))
        else:
            answered += 1
            assert probabilities.shape == (len(images), len(request.classes))
            assert probabilities.sum(dim=1).tolist() == pytest.approx([1.0] * len(images), abs=1e-3)
        if number == COUNT // 3:
            started = process.memory_info().rss
    assert [line for line in refused if len(line.splitlines()) != 1 or len(line) > 500] == []
    assert answered > COUNT // 20
    assert process.memory_info().rss - started < GROWTH * 2**20
