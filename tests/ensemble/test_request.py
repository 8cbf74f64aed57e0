"""Requests to the served ensemble: what is refused, and why."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import pytest
from PIL import Image

from mode.ensemble import request
from mode.ensemble.request import from_base64, read_request
from mode.errors import ModeError


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def png(width: int = 2, height: int = 2) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has that many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_good_request() -> None:
    read = read_request([encoded(png()), "data:image/png;base64," + encoded(png())], {"classes": ["a", "b"]})
    assert read.images == [png(), png()]
    assert (read.classes, read.templates) == (["a", "b"], ["{c}"])


@pytest.mark.parametrize(
    ("images", "params", "message"),
    [
        ([], {"classes": ["a"]}, "there is none"),
        ([encoded(png())], {}, "classes: the list is empty"),
        ([encoded(png())], {"classes": []}, "classes: the list is empty"),
        ([encoded(png())], {"classes": "dog"}, "classes: not a list of texts"),
        ([encoded(png())], {"classes": ["a", 3]}, "classes: not a list of texts"),
        ([encoded(png())], {"classes": ["a"] * 1001}, "classes: 1,001, more than 1,000"),
        ([encoded(png())], {"classes": ["a"] * 1000, "templates": ["{c}"] * 11}, "prompts, more than 10,000"),
        ([encoded(png())], {"classes": ["a" * 1001]}, "longer than 1,000"),
        ([encoded(png())] * 257, {"classes": ["a"]}, "257 rows, more than 256"),
        (["?!"], {"classes": ["a"]}, "image 0: not base64"),
        ([encoded(png()), 3], {"classes": ["a"]}, "image 1: not a text"),
        ([encoded(b"no image")], {"classes": ["a"]}, "image 0: not an image"),
        ([encoded(bomb(10_000, 10_000))], {"classes": ["a"]}, "image 0: 10000 x 10000 pixels, more than"),
        ([encoded(bomb(60_000, 60_000))], {"classes": ["a"]}, "image 0: too many pixels"),
    ],
)
def test_bad_requests_are_refused(images: list[object], params: dict[str, object], message: str) -> None:
    with pytest.raises(ModeError, match=message):
        read_request(images, params)


def test_a_large_image_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "MAX_BYTES", 1000)
    with pytest.raises(ModeError, match="image 0: larger than"):
        read_request(["A" * 2000], {"classes": ["a"]})


def test_base64() -> None:
    assert from_base64(encoded(b"abc"), 0) == b"abc"
    assert from_base64("data:image/png;base64," + encoded(b"abc"), 0) == b"abc"
    with pytest.raises(ModeError, match="image 3: not base64"):
        from_base64("?!", 3)
