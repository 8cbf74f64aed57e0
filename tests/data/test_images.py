from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from mode.data.images import UndecodableImage, decode, is_complete, normalise, resize_and_crop
from mode.data.loading.augment import augment_batch, random_crop
from mode.data.loading.pixels import training_pixels
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
    assert augment_batch(IMAGES, ImageParams(size=9), random_seed=0, positions=np.arange(len(IMAGES))) is IMAGES
    assert (
        len(
            augment_batch(
                IMAGES[:0], ImageParams(size=9, flip=True), random_seed=0, positions=np.arange(len(IMAGES[:0]))
            )
        )
        == 0
    )


def test_flips_half() -> None:
    out = augment_batch(IMAGES, ImageParams(size=9, flip=True), random_seed=0, positions=np.arange(len(IMAGES)))
    flipped = [bool(torch.equal(a, b.flip(2))) for a, b in zip(out, IMAGES, strict=True)]
    kept = [bool(torch.equal(a, b)) for a, b in zip(out, IMAGES, strict=True)]
    assert [a != b for a, b in zip(flipped, kept, strict=True)] == [True] * 64
    assert 16 < sum(flipped) < 48


def test_shifts_repeat_the_edge() -> None:
    out = augment_batch(IMAGES, ImageParams(size=9, shift=2), random_seed=3, positions=np.arange(len(IMAGES)))
    seen = set()
    for image, original in zip(out, IMAGES, strict=True):
        padded = torch.nn.functional.pad(original[None].float(), (2, 2, 2, 2), mode="replicate")[0].byte()
        places = [(x, y) for x in range(5) for y in range(5) if torch.equal(image, padded[:, y : y + 9, x : x + 9])]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) > 15, "of 25 shifts, 64 images should show most"


def test_augmentation_depends_on_the_position_only() -> None:
    params = ImageParams(size=9, flip=True, shift=3)
    whole = augment_batch(IMAGES, params, random_seed=7, positions=1000 + np.arange(len(IMAGES)))
    parts = [
        augment_batch(
            IMAGES[i : i + 13], params, random_seed=7, positions=1000 + i + np.arange(len(IMAGES[i : i + 13]))
        )
        for i in range(0, 64, 13)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(augment_batch(IMAGES, params, random_seed=8, positions=1000 + np.arange(len(IMAGES))), whole)


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


def _png_header(width: int, height: int) -> bytes:
    """A PNG of one colour, made without its pixels: the rows are compressed zeros."""
    rows = zlib.compress(bytes(-(-width // 8) + 1) * height, 9)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("extent", [(1, 20_000), (20_000, 1), (1, 65_000), (1, 51), (408, 8)])
@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_thin_images_are_refused_before_they_are_resized(extent: tuple[int, int], decoder: str) -> None:
    """At 336 pixels, 1 x 20,000 would take 9 GB."""
    for content in (_png_header(*extent), encoded(extent, "JPEG")):
        with pytest.raises(UndecodableImage, match=r"longer than 50 times the shorter side"):
            decode(content)
        with pytest.raises(UndecodableImage, match=r"longer than 50 times the shorter side"):
            training_pixels(content, ImageParams.model_validate({"size": 336, "decode": decoder}), None, 0)


def test_the_longest_image_that_is_taken() -> None:
    assert resize_and_crop(decode(_png_header(1, 50)), 336).shape == (3, 336, 336)
    assert decode(_png_header(400, 8)).size == (400, 8)


def test_images_of_too_many_pixels_or_scans_are_refused() -> None:
    with pytest.raises(UndecodableImage, match="pixels, more than 50,000,000"):
        decode(_png_header(8_000, 8_000))
    content = encoded((640, 480), "JPEG", progressive=True)
    assert decode(content).size == (640, 480)
    scan = content[content.rindex(b"\xff\xda") : -2]
    with pytest.raises(UndecodableImage, match="more than 200 scans"):
        decode(content[:-2] + scan * 300 + content[-2:])


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "EPS", "JPEG2000", "TGA", "PDF"])
def test_no_other_formats(kind: str) -> None:
    with pytest.raises(UndecodableImage, match="none of JPEG, PNG, WEBP"):
        decode(encoded((32, 32), kind))


def encoded(extent: tuple[int, int], kind: str, **options: object) -> bytes:
    """A grey image."""
    buffer = io.BytesIO()
    Image.new("RGB", extent, (90, 90, 90)).save(buffer, kind, **options)
    return buffer.getvalue()


def test_whether_an_image_ends_as_its_format_does() -> None:
    for kind in ("JPEG", "PNG"):
        content = encoded((20, 20), kind)
        assert is_complete(content)
        assert not is_complete(content[:-1])
    assert is_complete(encoded((20, 20), "WEBP")[:-1]), "it says nothing"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "RGB", "RGBA", "P"])
def test_what_is_decoded_can_be_resized(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (20, 30)).save(buffer, "PNG")
    assert resize_and_crop(decode(buffer.getvalue()), 16).shape == (3, 16, 16)
