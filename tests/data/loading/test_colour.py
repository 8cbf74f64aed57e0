"""Colours of a batch against torchvision's functions, image by image, and against the shares that were asked for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional

from mode.data.loading import colour
from mode.data.loading.augment import augment_batch, random_box
from mode.data.loading.pixels import training_pixels
from mode.params import ImageParams

IMAGES = torch.randint(0, 256, (60, 3, 7, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IMAGES[::5] = IMAGES[::5, :1]  # grey ones, whose hue is none
FULL = ImageParams(size=9, color_jitter=(0.4, 0.3, 1.5, 0.1), color_jitter_prob=0.75, gray_scale_prob=0.25)

CHANGES = {
    "_change_brightness": functional.adjust_brightness,
    "_change_contrast": functional.adjust_contrast,
    "_change_saturation": functional.adjust_saturation,
    "_turn_hue": functional.adjust_hue,
}


@pytest.mark.parametrize("name", CHANGES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=20)
def test_each_change_is_torchvisions(name: str, seed: int) -> None:
    low, high = (-0.5, 0.5) if name == "_turn_hue" else (0.0, 2.5)
    strengths = np.random.default_rng(seed).uniform(low, high, len(IMAGES))
    strengths[:3] = [low, high, (low + high) / 2]
    ours = getattr(colour, name)(IMAGES, torch.from_numpy(strengths)[:, None, None, None])
    theirs = torch.stack([CHANGES[name](each, float(by)) for each, by in zip(IMAGES, strengths, strict=True)])
    apart = (ours.int() - theirs.int()).abs()
    assert int(apart.max()) <= 1, "the last bit of a float may be rounded the other way"
    assert float((apart > 0).float().mean()) < 0.01


def test_grey_is_torchvisions() -> None:
    ours = augment_batch(
        IMAGES, ImageParams(size=9, gray_scale_prob=1.0), random_seed=0, positions=np.arange(len(IMAGES))
    )
    assert torch.equal(ours, functional.rgb_to_grayscale(IMAGES, num_output_channels=3))


def test_worked_out_by_hand() -> None:
    """Twice as bright; contrast 0 is the mean grey; saturation 0 is grey; half a turn makes red cyan."""
    pixel = torch.tensor([200, 100, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    grey = int(200 * 0.2989 + 100 * 0.587)  # 118
    strength = torch.tensor([0.0], dtype=torch.float64).view(1, 1, 1, 1)
    assert colour._change_brightness(pixel, strength + 2).flatten().tolist() == [255, 200, 0]
    assert colour._change_contrast(pixel, strength).flatten().tolist() == [grey] * 3
    assert colour._change_saturation(pixel, strength).flatten().tolist() == [grey] * 3
    assert colour._turn_hue(pixel, strength + 0.5).flatten().tolist() == [0, 100, 200]
    assert colour._turn_hue(pixel, strength).flatten().tolist() == [200, 100, 0]


def test_as_many_as_asked_for_by_as_much_as_asked_for() -> None:
    flat = torch.full((4_000, 3, 1, 1), 100, dtype=torch.uint8)
    params = ImageParams(size=1, color_jitter=(0.4, 0, 0, 0), color_jitter_prob=0.8)
    out = augment_batch(flat, params, random_seed=1, positions=np.arange(len(flat)))[:, 0, 0, 0]
    assert abs(float((out != 100).float().mean()) - 0.8 * 80 / 81) < 0.03  # of 81 values one is what it was
    assert (int(out.min()), int(out.max())) == (60, 139)
    coloured = torch.tensor([200, 100, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(4_000, 3, 1, 1)
    grey = augment_batch(
        coloured, ImageParams(size=1, gray_scale_prob=0.2), random_seed=1, positions=np.arange(len(coloured))
    )
    is_grey = (grey[:, 0] == grey[:, 2]).flatten()
    assert abs(float(is_grey.float().mean()) - 0.2) < 0.03
    assert torch.equal(grey[~is_grey], coloured[~is_grey])
    assert int(coloured[0, 0]) == 200, "what was given is as it was"


def test_all_orders_of_changes_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[str]] = {}

    def noting(name: str) -> object:
        def change(images: Tensor, strength: Tensor) -> Tensor:
            for number in images[:, 0, 0, 0].tolist():
                seen.setdefault(number, []).append(name)
            return images

        return change

    monkeypatch.setattr(colour, "_CHANGES", tuple(noting(name) for name in "bcsh"))
    numbered = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    params = FULL.model_copy(update={"color_jitter_prob": 1.0})
    augment_batch(numbered, params, random_seed=0, positions=np.arange(len(numbered)))
    assert {"".join(sorted(names)) for names in seen.values()} == {"bchs"}
    assert len({"".join(names) for names in seen.values()}) == 24


@given(cuts=st.lists(st.integers(0, 60), max_size=5), position=st.integers(0, 2**40), seed=st.integers(0, 2**32))
@settings(max_examples=25)
def test_colours_depend_on_the_position_only(cuts: list[int], position: int, seed: int) -> None:
    params = FULL.model_copy(update={"flip": True})
    whole = augment_batch(IMAGES, params, random_seed=seed, positions=position + np.arange(len(IMAGES)))
    edges = [0, *sorted(cuts), 60]
    parts = [
        augment_batch(IMAGES[a:b], params, random_seed=seed, positions=position + a + np.arange(len(IMAGES[a:b])))
        for a, b in pairwise(edges)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(
        augment_batch(IMAGES, params, random_seed=seed, positions=position + 60 + np.arange(len(IMAGES))), whole
    )


def test_nothing_to_change_is_nothing_done() -> None:
    assert augment_batch(IMAGES, ImageParams(size=9), random_seed=0, positions=np.arange(len(IMAGES))) is IMAGES
    still = ImageParams(size=9, color_jitter=(0, 0, 0, 0), color_jitter_prob=1.0)
    assert torch.equal(augment_batch(IMAGES, still, random_seed=0, positions=np.arange(len(IMAGES))), IMAGES)
    assert len(augment_batch(IMAGES[:0], FULL, random_seed=0, positions=np.arange(len(IMAGES[:0])))) == 0


@given(
    ratio=st.tuples(st.floats(0.01, 1.0), st.floats(1.0, 50.0)),
    extent=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    position=st.integers(0, 1_000),
)
def test_crops_have_a_shape_of_the_ratio(ratio: tuple[float, float], extent: tuple[int, int], position: int) -> None:
    left, top, right, bottom = random_box(extent, 0.2, 0, position, ratio)
    assert 0 <= left < right <= extent[0]
    assert 0 <= top < bottom <= extent[1]
    width, height = right - left, bottom - top
    # Half a pixel of rounding either way; a very long image has no part of such a shape and gives what is nearest.
    assert width + 0.5 >= ratio[0] * (height - 0.5) or width == extent[0]
    assert width - 0.5 <= ratio[1] * (height + 0.5) or height == extent[1]


@pytest.mark.parametrize("decode", ["fast", "exact"])
def test_the_ratio_reaches_the_crops(encode: object, decode: str) -> None:
    content = encode(3, (40, 30))  # type: ignore[operator]
    narrow = {"size": 8, "crop_scale": 0.3, "crop_ratio": (0.3, 0.3), "decode": decode}
    wide = {**narrow, "crop_ratio": (3, 3)}
    crops = [training_pixels(content, ImageParams.model_validate(each), 5, 0) for each in (narrow, wide)]
    usual = training_pixels(content, ImageParams.model_validate({**narrow, "crop_ratio": (3 / 4, 4 / 3)}), 5, 0)
    assert not np.array_equal(*crops)
    del narrow["crop_ratio"]
    assert np.array_equal(usual, training_pixels(content, ImageParams.model_validate(narrow), 5, 0))
