from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from mode.clip.model import Clip, build_model
from mode.clip.preprocess import Preprocess, SharedPreprocess
from mode.params import ImageParams, ModelParams

PICTURES = [
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (41, 67, 3), dtype=np.uint8)) for number in range(3)
]


@pytest.fixture
def clip(vit: ModelParams) -> Clip:
    return build_model(vit, ImageParams(size=32), ["a red dog"], random_seed=0)


def changed(clip: Clip, **settings: Any) -> Clip:
    """The same model behind another transform."""
    return replace(clip, preprocess_cfg={**clip.preprocess_cfg, **settings})


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_and_normalisation_equal_open_clips_transform(clip: Clip, resize_mode: str, interpolation: str) -> None:
    other = changed(clip, resize_mode=resize_mode, interpolation=interpolation)
    preprocess = Preprocess(other)
    expected = image_transform_v2(PreprocessCfg(**other.preprocess_cfg), is_train=False)(PICTURES[0])
    assert torch.equal(preprocess.normalise(preprocess.pixels(PICTURES[0])), expected)
    assert torch.equal(preprocess.transform(PICTURES[0]), expected)


def test_a_configuration_without_a_size_has_the_models(clip: Clip) -> None:
    assert Preprocess(replace(clip, preprocess_cfg={})).pixels(PICTURES[0]).shape == (3, 32, 32)


def test_models_share_what_is_equal_and_nothing_else(clip: Clip) -> None:
    clips = {
        "plain": clip,
        "same": changed(clip),
        "mean": changed(clip, mean=[0.5, 0.5, 0.5]),
        "size": changed(clip, size=24),
    }
    shared = SharedPreprocess(clips)
    pixels = shared.pixels(PICTURES)
    assert sorted(batch.shape[-1] for batch in pixels.values()) == [24, 32]
    inputs = shared.inputs(pixels, "cpu")
    assert list(inputs) == list(clips)
    assert inputs["plain"] is inputs["same"]
    for name, each in clips.items():
        assert torch.equal(inputs[name], torch.stack([Preprocess(each).transform(picture) for picture in PICTURES]))


def test_alike(clip: Clip) -> None:
    assert SharedPreprocess({"a": clip, "b": changed(clip)}).alike
    assert not SharedPreprocess({"a": clip, "b": changed(clip, std=[0.5, 0.5, 0.5])}).alike
