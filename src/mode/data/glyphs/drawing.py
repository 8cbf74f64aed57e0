"""Characters drawn as small varied pictures, a batch at a time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont  # type: ignore[import-untyped]
from PIL import Image, ImageDraw, ImageFont

#: Faces of DejaVu: what training draws with, and what only the evaluation tasks draw with.
TRAINING_FONTS = ("Sans", "Sans-Oblique", "Serif", "Serif-Italic", "SansMono", "SansMono-Oblique")
TASK_FONTS = ("Sans-Bold",)

#: Colours that captions may name.
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (25, 25, 25),
    "white": (238, 238, 238),
    "grey": (128, 128, 128),
    "red": (205, 35, 40),
    "orange": (240, 140, 30),
    "yellow": (245, 220, 50),
    "green": (40, 140, 55),
    "blue": (40, 80, 195),
    "cyan": (60, 200, 215),
    "purple": (125, 45, 150),
    "pink": (245, 150, 185),
    "brown": (115, 70, 35),
}
#: Least difference of luma (0 to 255) between a character and its background.
_CONTRAST = 70.0

_JPEG_QUALITY = 90


def draw(
    characters: Sequence[str], fonts: Sequence[str], size: int, rng: np.random.Generator
) -> tuple[list[bytes], list[tuple[str, str]]]:
    """Draw characters with random font, colours, shade, rotation, shear, size, position and noise.

    Args:
        characters: one per picture, in any number.
        fonts: names to choose from; of those, fonts without a character do not draw it.
        size: pixels a side.
        rng: decides everything: the same generator state draws the same bytes.

    Returns:
        JPEGs; and for each the names of the colours of character and background.
    """
    count = len(characters)
    masks = np.empty((count, size, size), np.float32)
    places = _random_places(count, size, rng)
    choices = rng.random(count)
    for number, character in enumerate(characters):
        having = fonts_with(character, tuple(fonts))
        font = having[int(choices[number] * len(having))]
        masks[number] = _place(_stencil(character, font, 2 * size), places[number], size)
    pixels, colours = _colour(masks / 255, rng)
    return [_encode(picture) for picture in pixels], colours


@cache
def fonts_with(character: str, fonts: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the fonts that have a character."""
    return tuple(font for font in fonts if ord(character) in _characters_of(font))


@cache
def _font_folder() -> Path:
    """Where matplotlib has its fonts; found without importing it, which every process that draws would wait for."""
    found = find_spec("matplotlib")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"


def _font_path(font: str) -> Path:
    return _font_folder() / f"DejaVu{font}.ttf"


@cache
def _characters_of(font: str) -> frozenset[int]:
    return frozenset(TTFont(_font_path(font), lazy=True).getBestCmap())


@cache
def _font(font: str, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout draws one character as it stands, with or without the library for complex scripts.
    return ImageFont.truetype(_font_path(font), size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=16_384)
def _stencil(character: str, font: str, size: int) -> Image.Image:
    """A character in the middle of a `size` x `size` mask, its larger side 0.5 to 0.75 of that.

    Sizes that the font means ("small", "large") survive within these bounds; dominoes and dots come to be readable.
    """
    em = round(0.75 * size)
    left, top, right, bottom = _font(font, em).getbbox(character)
    largest = max(right - left, bottom - top, 1)
    fitted = round(em * min(max(largest, 0.5 * size), 0.75 * size) / largest)
    left, top, right, bottom = _font(font, fitted).getbbox(character)
    mask = Image.new("L", (size, size))
    origin = ((size - right - left) / 2, (size - bottom - top) / 2)
    ImageDraw.Draw(mask).text(origin, character, fill=255, font=_font(font, fitted))
    return mask


def _random_places(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Inverse affine maps [count, 6] from picture to stencil pixels: rotation, shear, size and position."""
    angle = np.deg2rad(rng.uniform(-18, 18, count))
    shear = rng.uniform(-0.2, 0.2, count)
    # A stencil is twice as large as the picture; below 2 a character comes out larger than its stencil has it.
    scale = 2 / rng.uniform(0.8, 1.2, count)
    shift = rng.uniform(-0.09, 0.09, (2, count)) * size
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    across, down = np.stack([cos, cos * shear + sin]), np.stack([-sin, cos - sin * shear])
    centre = size / 2 + shift
    offset_x = size - across[0] * centre[0] - across[1] * centre[1]
    offset_y = size - down[0] * centre[0] - down[1] * centre[1]
    return np.stack([across[0], across[1], offset_x, down[0], down[1], offset_y], axis=1)


def _place(stencil: Image.Image, place: np.ndarray, size: int) -> np.ndarray:
    coefficients = tuple(place.tolist())
    placed = stencil.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(placed, np.float32)


@cache
def _colour_pairs() -> tuple[list[tuple[str, str]], np.ndarray]:
    """Names and RGB [pairs, 2, 3] of colours that can be told apart."""
    luma = {name: float(np.dot((0.299, 0.587, 0.114), rgb)) for name, rgb in COLOURS.items()}
    names = [(ink, paper) for ink in COLOURS for paper in COLOURS if abs(luma[ink] - luma[paper]) >= _CONTRAST]
    return names, np.array([(COLOURS[ink], COLOURS[paper]) for ink, paper in names], np.float32)


def _colour(masks: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Ink through masks [count, size, size] (0 to 1) on paper with a slope and noise: uint8 [count, size, size, 3]."""
    count, size, _ = masks.shape
    names, pairs = _colour_pairs()
    chosen: np.ndarray = rng.integers(len(names), size=(count,))
    ink_and_paper = pairs[chosen] + rng.uniform(-20, 20, (count, 2, 3)).astype(np.float32)
    ink, paper = ink_and_paper[:, 0, None, None, :], ink_and_paper[:, 1, None, None, :]
    line = np.linspace(-1, 1, size, dtype=np.float32)
    slope = rng.uniform(-20, 20, (2, count, 1, 1)).astype(np.float32)
    shade = (slope[0] * line[:, None] + slope[1] * line[None, :])[..., None]
    strength = rng.uniform(0, 14, (count, 1, 1, 1)).astype(np.float32)
    noise = rng.standard_normal((count, size, size, 3), np.float32) * strength
    pixels = paper + (ink - paper) * masks[..., None] + shade + noise
    return np.clip(pixels, 0, 255).astype(np.uint8), [names[number] for number in chosen]


def _encode(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Full colour resolution: at these sizes the usual halving would smear one-pixel strokes.
    Image.fromarray(picture).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
