from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from mode.data.images import UndecodableImage, decode, normalise, resize_and_crop
from mode.data.loading.augment import augment_batch, random_crop
from mode.params import ImageParams


@pytest.mark.parametrize("extent", [(16, 16), (17, 16), (40, 23), (23, 40), (5, 90), (9, 7), (1, 1), (300, 200)])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_as_open_clip_transforms_it(encode: Callable[..., bytes], extent: tuple[int, int], mode: str) -> None:
    params = ImageParams(size=16)
    content = encode(size=extent, kind="PNG", mode=mode)
    theirs = image_transform(16, is_train=False, mean=params.mean, std=params.std)(Image.open(io.BytesIO(content)))
    pixels = resize_and_crop(decode(content), 16)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (3, 16, 16))
    ours = normalise(torch.from_numpy(pixels.copy())[None], params.mean, params.std)[0]
    assert torch.equal(ours, theirs)
    assert normalise(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), params.mean, params.std).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"GIF89a", lambda c: c[: len(c) // 2], lambda c: c[::-1]])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_what_cannot_be_decoded(encode: Callable[..., bytes], damage: Callable[[bytes], bytes], kind: str) -> None:
    with pytest.raises(UndecodableImage):
        decode(damage(encode(kind=kind, size=(64, 64))))


IMAGES = torch.randint(0, 256, (64, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_nothing_to_augment() -> None:
    assert augment_batch(IMAGES, ImageParams(size=9), random_seed=0, position=0) is IMAGES
    assert len(augment_batch(IMAGES[:0], ImageParams(size=9, flip=True), random_seed=0, position=0)) == 0


def test_flips_half() -> None:
    out = augment_batch(IMAGES, ImageParams(size=9, flip=True), random_seed=0, position=0)
    flipped = [bool(torch.equal(a, b.flip(2))) for a, b in zip(out, IMAGES, strict=True)]
    kept = [bool(torch.equal(a, b)) for a, b in zip(out, IMAGES, strict=True)]
    assert [a != b for a, b in zip(flipped, kept, strict=True)] == [True] * 64
    assert 16 < sum(flipped) < 48


def test_shifts_repeat_the_edge() -> None:
    out = augment_batch(IMAGES, ImageParams(size=9, shift=2), random_seed=3, position=0)
    seen = set()
    for image, original in zip(out, IMAGES, strict=True):
        padded = torch.nn.functional.pad(original[None].float(), (2, 2, 2, 2), mode="replicate")[0].byte()
        places = [(x, y) for x in range(5) for y in range(5) if torch.equal(image, padded[:, y : y + 9, x : x + 9])]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) > 15, "of 25 shifts, 64 images should show most"


def test_augmentation_depends_on_the_position_only() -> None:
    params = ImageParams(size=9, flip=True, shift=3)
    whole = augment_batch(IMAGES, params, random_seed=7, position=1000)
    parts = [augment_batch(IMAGES[i : i + 13], params, random_seed=7, position=1000 + i) for i in range(0, 64, 13)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(augment_batch(IMAGES, params, random_seed=8, position=1000), whole)


@pytest.mark.parametrize("extent", [(40, 30), (1, 1), (200, 3), (3, 200)])
def test_random_crop(extent: tuple[int, int]) -> None:
    # Each pixel tells its place, so that a crop tells its box.
    width, height = extent
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture = Image.fromarray(np.stack([x, y, x], 2).astype(np.uint8))
    crops = [random_crop(picture, 8, 0.5, random_seed=0, position=position) for position in range(20)]
    assert {crop.shape for crop in crops} == {(3, 8, 8)}
    assert np.array_equal(crops[3], random_crop(picture, 8, 0.5, random_seed=0, position=3))
    if extent == (40, 30):
        assert len({crop.tobytes() for crop in crops}) == 20
        shares = [np.ptp(crop[0].astype(float)) * np.ptp(crop[1].astype(float)) / 255**2 for crop in crops]
        assert min(shares) > 0.3  # half of the area, less what the resize takes from the edges
