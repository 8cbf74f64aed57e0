"""Inputs that several races share: tars of photograph-like pictures with captions."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

#: Different pictures; tars larger than this repeat them.
DISTINCT = 256


def make_pictures(count: int = DISTINCT, random_seed: int = 0, extent: tuple[int, int] = (500, 375)) -> list[bytes]:
    """JPEGs (quality 90) of smooth noise with a little grain: as large and as slow to decode as a photograph.

    Args:
        count: pictures.
        seed: of the noise.
        extent: width and height in pixels.
    """
    from PIL import Image

    random = np.random.default_rng(random_seed)
    pictures = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (extent[1] // 25, extent[0] // 25, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(extent, Image.Resampling.BICUBIC), dtype=np.int16)
        grain = random.normal(0, 5, smooth.shape).astype(np.int16)
        file = io.BytesIO()
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    return pictures


def photographs(folder: Path, count: int) -> list[bytes]:
    """The first JPEGs of a folder's tars."""
    from mode.data.shards.tar import members

    found: list[bytes] = []
    for path in sorted(folder.rglob("*.tar")):
        with path.open("rb") as file:
            for member in members(file.fileno(), path.stat().st_size):
                if member.name.lower().endswith((".jpg", ".jpeg")):
                    found.append(os.pread(file.fileno(), member.size, member.offset))
                    if len(found) == count:
                        return found
    if not found:
        raise SystemExit(f"error: {folder}: no tar with a JPEG in it")
    return found


def captions(count: int, random_seed: int = 0) -> list[str]:
    """Captions of the built-in data: 1 to 12 words, a tenth of them noise; some run together into longer ones."""
    from mode.data.glyphs.dataset import caption
    from mode.data.glyphs.families import FAMILIES
    from mode.params import GlyphParams

    random = np.random.default_rng(random_seed)
    params = GlyphParams()
    kinds = [(character, family.kind) for family in FAMILIES for character in family.characters]
    colours = ("red", "green", "blue", "black", "white")
    texts = []
    for _ in range(count):
        parts = []
        # As on the web: most captions are short, a few are whole paragraphs.
        for _ in range(min(8, random.geometric(0.6))):
            character, kind = kinds[random.integers(len(kinds))]
            pair = (colours[random.integers(5)], colours[random.integers(5)])
            parts.append(caption(character, kind, pair, params, random))
        texts.append(", ".join(parts))
    return texts


def write_tars(folder: Path, images: list[bytes], texts: list[str], per_tar: int) -> None:
    """`00000.tar`, `00001.tar` ... as img2dataset writes them: `key.jpg`, `key.json`, `key.txt`.

    Args:
        folder: made if it is not there.
        images: used again from the first when they are fewer than the texts.
        texts: one pair each.
        per_tar: pairs in a tar.
    """
    import json

    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(texts), per_tar):
        with tarfile.open(folder / f"{start // per_tar:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(start, min(start + per_tar, len(texts))):
                key, image = f"{number:09d}", images[number % len(images)]
                about = {"caption": texts[number], "key": key, "status": "success", "width": 500, "height": 375}
                for suffix, content in (
                    ("jpg", image),
                    ("json", json.dumps(about).encode()),
                    ("txt", texts[number].encode()),
                ):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def tars_of(folder: Path) -> list[str]:
    """Paths of a folder's tars, in order."""
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def tar_members(path: str) -> Iterator[tuple[str, bytes]]:
    """Every member of a tar, name and content, as the standard library reads it from end to end."""
    with tarfile.open(path, "r|") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                yield member.name, file.read()
