"""A request to the served ensemble: what it may hold, and how it is checked before any image is decoded."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mode.ensemble.model import TEMPLATES
from mode.errors import ModeError

#: Images in one request, bytes and pixels of one of them.
MAX_IMAGES, MAX_BYTES, MAX_PIXELS = 256, 20 * 2**20, 50_000_000
#: Classes, templates, the prompts that they make together, and characters of one of them.
MAX_CLASSES, MAX_TEMPLATES, MAX_PROMPTS, MAX_CHARACTERS = 1_000, 100, 10_000, 1_000


@dataclass(frozen=True)
class Request:
    """A request that can be answered.

    Attributes:
        images: encoded, at most MAX_IMAGES.
        classes: at least one.
        templates: at least one, with `{c}` each.
    """

    images: list[bytes]
    classes: list[str]
    templates: list[str]


def read_request(images: Sequence[Any], params: Mapping[str, Any]) -> Request:
    """Check a request.

    Args:
        images: base64, with or without a `data:` prefix.
        params: `classes`, and perhaps `templates`.

    Raises:
        ModeError: nothing to answer, something of a wrong type, not base64, not an image, or above a limit.
    """
    classes = _texts(params, "classes", MAX_CLASSES)
    templates = _texts(params, "templates", MAX_TEMPLATES) or list(TEMPLATES)
    if not classes:
        raise ModeError("classes: the list is empty", "give at least one name")
    if len(classes) * len(templates) > MAX_PROMPTS:
        raise ModeError(
            f"classes x templates: {len(classes):,} x {len(templates):,} prompts, more than {MAX_PROMPTS:,}"
        )
    if not len(images):
        raise ModeError("image: there is none", "give at least one row")
    if len(images) > MAX_IMAGES:
        raise ModeError(f"image: {len(images):,} rows, more than {MAX_IMAGES}", "send several requests")
    return Request([_image(image, number) for number, image in enumerate(images)], classes, templates)


def from_base64(text: str, number: int) -> bytes:
    """The bytes of an image given as base64, with or without a `data:` prefix; `number` names it in errors.

    Raises:
        ModeError: not base64.
    """
    try:
        return base64.b64decode(text.rpartition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise ModeError(f"image {number}: not base64") from None


def _texts(params: Mapping[str, Any], key: str, most: int) -> list[str]:
    given = params.get(key)
    if given is None:
        return []
    listed = list(given) if not isinstance(given, str) else None
    if listed is None or not all(isinstance(text, str) for text in listed):
        raise ModeError(f"{key}: not a list of texts")
    if len(listed) > most:
        raise ModeError(f"{key}: {len(listed):,}, more than {most:,}")
    if any(len(text) > MAX_CHARACTERS for text in listed):
        raise ModeError(f"{key}: a text is longer than {MAX_CHARACTERS:,} characters")
    return listed


def _image(given: Any, number: int) -> bytes:
    if not isinstance(given, str):
        raise ModeError(f"image {number}: not a text", "images are sent as base64")
    if len(given) > MAX_BYTES * 4 // 3 + 100:
        raise ModeError(f"image {number}: larger than {MAX_BYTES // 2**20} MiB")
    content = from_base64(given, number)
    try:
        width, height = Image.open(io.BytesIO(content)).size  # reads the header, decodes no pixel
    except Exception as error:  # Pillow's plugins raise whatever their parser runs into
        reason = "too many pixels" if isinstance(error, Image.DecompressionBombError) else "not an image"
        raise ModeError(f"image {number}: {reason}") from None
    if width * height > MAX_PIXELS:
        raise ModeError(f"image {number}: {width} x {height} pixels, more than {MAX_PIXELS:,}")
    return content
