"""Fast pixels against open_clip's own transform, and the batch meant for a GPU against one image after the other."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from mode.data.images import UndecodableImage
from mode.data.loading.pixels import aside, pixels_on_device, resize, training_pixels
from mode.params import ImageParams

SIZES = [(32, 32), (31, 32), (33, 90), (90, 33), (64, 64), (200, 150), (17, 400), (5, 5)]


def picture(extent: tuple[int, int], kind: str = "JPEG", mode: str = "RGB", seed: int = 0) -> bytes:
    """Smooth, as photographs are: noise would make every value a matter of rounding."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(extent, Image.Resampling.BICUBIC).convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def reference(content: bytes, size: int = 32) -> np.ndarray:
    transform = image_transform_v2(PreprocessCfg(size=size, mean=(0, 0, 0), std=(1, 1, 1)), is_train=False)
    return (transform(Image.open(io.BytesIO(content))) * 255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("extent", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_fast_is_open_clips_transform_but_for_rounding(extent: tuple[int, int], mode: str) -> None:
    content = picture(extent, mode=mode)
    exact = training_pixels(content, ImageParams(size=32, decode="exact"), None, 0)
    assert np.array_equal(exact, reference(content))
    fast = training_pixels(content, ImageParams(size=32, decode="fast"), None, 0)
    assert (fast.dtype, fast.shape) == (np.uint8, (3, 32, 32))
    difference = np.abs(fast.astype(int) - exact.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.03
    if min(extent) == 32:  # nothing is resized
        assert not difference.any()


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGB"), ("PNG", "P"), ("WEBP", "RGB"), ("JPEG", "CMYK")])
def test_other_formats_are_exact(kind: str, mode: str) -> None:
    content = picture((50, 41), kind, mode)
    assert np.array_equal(training_pixels(content, ImageParams(size=32), None, 0), reference(content))


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"no image", picture((50, 41))[:300]])
def test_damaged_images_are_refused(content: bytes) -> None:
    with pytest.raises(UndecodableImage):
        training_pixels(content, ImageParams(size=32), None, 0)


def test_random_parts_are_the_same_parts() -> None:
    """Fast and exact cut out the same part: what is left is how its edge is resized."""
    content = picture((200, 150))
    for position in range(10):
        parts = [
            training_pixels(content, ImageParams(size=32, crop_scale=0.3, decode=how), position, 7).astype(int)
            for how in ("exact", "fast")
        ]
        assert np.abs(parts[0] - parts[1])[:, 2:-2, 2:-2].max() <= 2
        centre = training_pixels(content, ImageParams(size=32), None, 7).astype(int)
        assert np.abs(parts[1] - centre).max() > 8


def test_a_whole_picture_as_a_box_is_resized_to_a_square() -> None:
    pixels = torch.arange(3 * 6 * 4, dtype=torch.uint8).reshape(3, 6, 4)
    assert resize(pixels, 4, (0, 1, 4, 5)).equal(pixels[:, 1:5])


@pytest.mark.parametrize("crop", [None, 0.4])
def test_a_batch_on_a_device_is_one_image_after_the_other(crop: float | None) -> None:
    """Run here with the CPU as the device; the GPU's decoder is another (see the next test)."""
    image = ImageParams(size=32, crop_scale=crop, decode="gpu")
    contents = [
        picture((50, 41)),
        b"",
        picture((60, 70), "PNG"),
        picture((40, 90), mode="L", seed=1),
        picture((50, 41))[:300],
        picture((50, 41), mode="CMYK"),
    ]
    positions = np.arange(10, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pixels, good = pixels_on_device(contents, image, positions, 3, torch.device("cpu"))
    assert good.tolist() == [True, False, True, True, False, True]
    for number in np.flatnonzero(good):
        alone = training_pixels(contents[number], image, int(positions[number]), 3)
        assert np.array_equal(pixels[number].numpy(), alone)
    assert not pixels[1].any()
    empty, none = pixels_on_device([], image, None, 3, torch.device("cpu"))
    assert (empty.shape, len(none)) == ((0, 3, 32, 32), 0)


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@NEEDS_GPU
def test_a_gpu_decodes_nearly_the_same() -> None:
    image = ImageParams(size=32, decode="gpu")
    contents = [picture((50, 41)), b"", picture((60, 70), "PNG"), picture((40, 90), mode="L"), picture((41, 50))[:300]]
    with aside(device := torch.device("cuda")) as hand_over:
        pixels, good = pixels_on_device(contents, image, None, 3, device)
        pixels = hand_over(pixels)
    assert good.tolist() == [True, False, True, True, False]
    for number in np.flatnonzero(good):
        alone = training_pixels(contents[number], image, None, 3)
        # Of 255. Colour has half the resolution and is enlarged in another way: 2.5 on an H200, for the first of these.
        assert np.abs(pixels[number].cpu().numpy().astype(int) - alone.astype(int)).mean() < 5


@NEEDS_GPU
def test_decoding_on_a_gpu_writes_to_no_memory_that_queued_kernels_read() -> None:
    """As a training queues them: memory is free for the next tensor before the kernels that read it have run."""
    device, image, extent = torch.device("cuda"), ImageParams(size=224, decode="gpu"), (500, 375)
    contents = [picture(extent, seed=seed) for seed in range(32)]

    def decoded() -> torch.Tensor:
        with aside(device) as hand_over:
            return hand_over(pixels_on_device(contents, image, None, 0, device)[0])

    expected = decoded().clone()
    for _ in range(5):
        held = [torch.ones(3, 375, 500, dtype=torch.uint8, device=device) for _ in contents]
        torch.cuda.synchronize()
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
        sums = [each.sum() for each in held]
        held.clear()
        pixels = decoded()
        again = decoded()
        assert {int(total) for total in sums} == {3 * 375 * 500}
        assert torch.equal(pixels, expected)
        assert torch.equal(again, expected)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("extent", [(32, 32), (90, 33), (33, 90), (17, 40)])
def test_other_ways_to_resize_are_open_clips_too(extent: tuple[int, int], interpolation: str, mode: str) -> None:
    """SigLIP squashes, others fill: exactly where asked for, and but for rounding where not."""
    content = picture(extent)
    shape = {"size": 32, "interpolation": interpolation, "resize_mode": mode, "fill_color": 7}
    config = PreprocessCfg(**shape, mean=(0, 0, 0), std=(1, 1, 1))  # type: ignore[arg-type]
    transform = image_transform_v2(config, is_train=False)
    expected = (transform(Image.open(io.BytesIO(content)).convert("RGB")) * 255).round().to(torch.uint8).numpy()
    exact = training_pixels(content, ImageParams(**shape, decode="exact"), None, 0)
    assert np.array_equal(exact, expected)
    fast = training_pixels(content, ImageParams(**shape), None, 0)
    assert np.abs(fast.astype(int) - expected.astype(int)).max() <= 1
    batch, good = pixels_on_device([content], ImageParams(**shape), None, 0, torch.device("cpu"))
    assert good.all()
    assert np.array_equal(batch[0].numpy(), fast)
