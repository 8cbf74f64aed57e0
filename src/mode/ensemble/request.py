"""A request to the served ensemble: what it may hold, checked before any image is decoded."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from mode.data.images import UndecodableImage, open_image
from mode.ensemble.model import TEMPLATES
from mode.errors import ModeError

#: Images in one request, bytes of one of them, and pixels of all: seconds of decoding.
MAX_IMAGES, MAX_BYTES, MAX_PIXELS_OF_ALL = 256, 20 * 2**20, 200_000_000
#: Bytes of a request as it is sent.
MAX_REQUEST = 32 * 2**20
#: Classes, templates, the prompts that they make together, and characters of one of them.
MAX_CLASSES, MAX_TEMPLATES, MAX_PROMPTS, MAX_CHARACTERS = 1_000, 100, 10_000, 1_000

#: Pydantic's errors in this program's words: those of one field, and those of any.
_FAULTS = {
    ("images", "too_short"): "there is none (give at least one row)",
    ("images", "too_long"): "{actual_length:,} rows, more than {max_length:,} (send several requests)",
    ("classes", "too_short"): "the list is empty (give at least one name)",
}
_FAULTS_ANYWHERE = {
    "too_long": "{actual_length:,}, more than {max_length:,}",
    "string_too_long": "a text is longer than {max_length:,} characters",
    "value_error": "{error}",
}


def _content(image: Any) -> bytes:
    """The encoded image in a base64 text, of which only the header is read."""
    if not isinstance(image, str):
        raise ValueError("not a text (images are sent as base64)")
    if len(image) > MAX_BYTES * 4 // 3 + 100:
        raise ValueError(f"larger than {MAX_BYTES // 2**20} MiB")
    try:
        content = base64.b64decode(image.rpartition(",")[2] if image.startswith("data:") else image, validate=True)
    except ValueError:
        raise ValueError("not base64") from None
    count_pixels(content)
    return content


def count_pixels(content: bytes) -> int:
    """Pixels of an encoded image, by its header alone.

    Raises:
        ValueError: it is none that is decoded here, in the words of `UndecodableImage`.
    """
    try:
        width, height = open_image(content).size
    except UndecodableImage as error:
        raise ValueError(str(error)) from None
    return width * height


Text = Annotated[str, Field(strict=True, max_length=MAX_CHARACTERS)]
Encoded = Annotated[bytes, BeforeValidator(_content)]


class Request(BaseModel):
    """A request that can be answered; the images are encoded, and given as base64 with or without a `data:` prefix."""

    classes: Annotated[list[Text], Field(min_length=1, max_length=MAX_CLASSES)]
    templates: Annotated[list[Text], Field(max_length=MAX_TEMPLATES)]
    images: Annotated[list[Encoded], Field(min_length=1, max_length=MAX_IMAGES)]

    @field_validator("images")
    @classmethod
    def _few_pixels(cls, images: list[bytes]) -> list[bytes]:
        pixels = sum(map(count_pixels, images))
        if pixels > MAX_PIXELS_OF_ALL:
            raise ValueError(f"{pixels:,} pixels together, more than {MAX_PIXELS_OF_ALL:,} (send several requests)")
        return images

    @model_validator(mode="after")
    def _few_prompts(self) -> Self:
        classes, templates = len(self.classes), len(self.templates)
        if classes * templates > MAX_PROMPTS:
            raise ValueError(f"classes x templates: {classes:,} x {templates:,} prompts, more than {MAX_PROMPTS:,}")
        return self


def read_request(images: Sequence[Any], params: Mapping[str, Any]) -> Request:
    """Check a request: `images` in base64, `params` with `classes` and perhaps `templates`.

    Raises:
        ModeError: nothing to answer, something of a wrong type, not base64, not an image, or above a limit.
    """
    classes, templates = _as_list(params.get("classes")), _as_list(params.get("templates"))
    given = {"classes": classes, "templates": TEMPLATES if templates == [] else templates, "images": list(images)}
    try:
        return Request.model_validate(given)
    except ValidationError as error:
        raise ModeError(_line(error.errors()[0])) from None


def _as_list(given: Any) -> Any:
    """MLflow gives arrays, and None for a parameter that is left out."""
    if given is None:
        return []
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else given


def _line(fault: Any) -> str:
    """One line on what pydantic found."""
    field, *number = fault["loc"] or [""]
    text = _FAULTS.get((field, fault["type"])) or _FAULTS_ANYWHERE.get(fault["type"], "not a list of texts")
    place = " ".join(["image", *map(str, number)]) if field == "images" else field
    return ": ".join(filter(None, (place, text.format(**fault.get("ctx", {})))))
