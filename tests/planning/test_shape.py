"""A model's size, found without making it."""

from __future__ import annotations

import pytest

from mode.clip.model import build_model
from mode.errors import ModeError
from mode.params import ImageParams, ModelParams
from mode.planning.shape import image_size_of, shape_of
from mode.training.card import flops_per_pair
from tests.small import VIT

CAPTIONS = ["a red dog", "a blue dog", "red shoes"]


def test_it_is_that_of_the_model_itself() -> None:
    clip = build_model(VIT, ImageParams(size=16), CAPTIONS, 0)
    words = clip.model_cfg["text_cfg"]["vocab_size"]
    shape = shape_of(VIT, 16, words)
    assert shape.parameters == sum(parameter.numel() for parameter in clip.model.parameters())
    assert shape.flops_per_pair == flops_per_pair(clip)
    assert (shape.embed_dim, shape.image_size) == (16, 16)
    # One float32 each, and open_clip keeps a text's mask beside the parameters or not.
    assert shape.state_bytes == sum(t.numel() * t.element_size() for t in clip.model.state_dict().values())


def test_forward_and_backward_are_three_times_forward() -> None:
    shape = shape_of(ModelParams(name="ViT-B-32"))
    forward = shape.flops_per_image + shape.flops_per_text
    assert shape.flops_per_pair == pytest.approx(3 * forward, rel=0.03)
    assert shape.parameters == pytest.approx(151.3e6, rel=1e-3)


def test_an_unknown_model_is_one_line() -> None:
    with pytest.raises(ModeError, match="open_clip knows no model 'ViT-Z'"):
        shape_of(ModelParams(name="ViT-Z"))


def test_image_size_is_the_configurations() -> None:
    assert image_size_of(ModelParams(name="ViT-L-14-336")) == 336
