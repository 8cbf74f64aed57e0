"""Requests to the served ensemble: what is refused, and why."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mode.ensemble.request import MAX_BYTES, read_request
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


#: A picture for which Pillow would start Ghostscript.
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\nshowpage\n%%EOF\n"


def test_a_good_request() -> None:
    read = read_request([encoded(png()), "data:image/png;base64," + encoded(png())], {"classes": ["a", "b"]})
    assert read.images == [png(), png()]
    assert (read.classes, read.templates) == (["a", "b"], ["{c}"])


@pytest.mark.parametrize(
    ("images", "params", "message"),
    [
        ([], {"classes": ["a"]}, r"^image: there is none \(give at least one row\)$"),
        ([encoded(png())], {}, r"^classes: the list is empty \(give at least one name\)$"),
        ([encoded(png())], {"classes": []}, "classes: the list is empty"),
        ([encoded(png())], {"classes": "dog"}, "classes: not a list of texts"),
        ([encoded(png())], {"classes": ["a", 3]}, "^classes: not a list of texts$"),
        ([encoded(png())], {"classes": 3}, "^classes: not a list of texts$"),
        ([encoded(png())], {"classes": ["a"], "templates": "{c}"}, "^templates: not a list of texts$"),
        ([encoded(png())], {"classes": ["a"], "templates": ""}, "^templates: not a list of texts$"),
        ([encoded(png())], {"classes": ["a"], "templates": ["{c}"] * 101}, "^templates: 101, more than 100$"),
        ([encoded(png())], {"classes": ["a"] * 1001}, "classes: 1,001, more than 1,000"),
        (
            [encoded(png())],
            {"classes": ["a"] * 1000, "templates": ["{c}"] * 11},
            "^classes x templates: 1,000 x 11 prompts, more than 10,000$",
        ),
        ([encoded(png())], {"classes": ["a" * 1001]}, "^classes: a text is longer than 1,000 characters$"),
        ([encoded(png())] * 257, {"classes": ["a"]}, r"^image: 257 rows, more than 256 \(send several requests\)$"),
        (["?!"], {"classes": ["a"]}, "image 0: not base64"),
        ([encoded(png()), 3], {"classes": ["a"]}, r"^image 1: not a text \(images are sent as base64\)$"),
        ([encoded(b"no image")], {"classes": ["a"]}, "image 0: none of JPEG, PNG, WEBP"),
        ([encoded(png(1, 20_000))], {"classes": ["a"]}, "image 0: 1 x 20000 pixels, longer than 50 times"),
        ([encoded(EPS)], {"classes": ["a"]}, "image 0: none of JPEG, PNG, WEBP"),
        (
            [encoded(bomb(7_000, 7_000))] * 5,
            {"classes": ["a"]},
            r"^image: 245,000,000 pixels together, more than 200,000,000 \(send several requests\)$",
        ),
        ([encoded(bomb(10_000, 10_000))], {"classes": ["a"]}, "image 0: 10000 x 10000 pixels, more than"),
        ([encoded(bomb(60_000, 60_000))], {"classes": ["a"]}, "image 0: .*exceeds limit"),
    ],
)
def test_bad_requests_are_refused(images: list[object], params: dict[str, object], message: str) -> None:
    with pytest.raises(ModeError, match=message):
        read_request(images, params)


def test_a_large_image_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ModeError, match="image 1: larger than 20 MiB"):
        read_request([encoded(png()), "?" * (MAX_BYTES * 3 // 2)], {"classes": ["a"]})


def test_arrays_as_mlflow_gives_them() -> None:
    params = {"classes": np.array(["a", "b"], dtype=object), "templates": np.array([], dtype=object)}
    read = read_request([encoded(png())], params)
    assert (read.classes, read.templates) == (["a", "b"], ["{c}"])
