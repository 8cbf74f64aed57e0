"""A model's size, found without making it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mode.clip.adapter import write_adapter
from mode.clip.folder import ADAPTER_WEIGHTS
from mode.clip.model import adapted, build_model
from mode.errors import ModeError
from mode.params import AdapterParams, ImageParams, ModelParams
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
    assert (shape.learnt, shape.learnt_bytes) == (shape.parameters, shape.state_bytes)
    # One float32 each, and open_clip keeps a text's mask beside the parameters or not.
    assert shape.state_bytes == sum(t.numel() * t.element_size() for t in clip.model.state_dict().values())


@pytest.mark.parametrize("targets", [None, ["visual.*"]])
def test_that_of_an_adapter_is_what_a_training_of_it_has(tmp_path: Path, targets: list[str] | None) -> None:
    clip = build_model(VIT, ImageParams(size=16), CAPTIONS, 0)
    params = AdapterParams(rank=2, targets=targets)
    adapter = adapted(clip, params, "seed", "0" * 64, 0)
    whole = shape_of(VIT, 16, clip.model_cfg["text_cfg"]["vocab_size"], adapter=params)
    assert replace(whole, adapter=None) == shape_of(VIT, 16, clip.model_cfg["text_cfg"]["vocab_size"])
    shape = whole.adapter
    assert shape is not None
    learnt = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]
    assert shape.learnt == sum(parameter.numel() for parameter in learnt)
    assert shape.parameters == sum(parameter.numel() for parameter in adapter.model.parameters())
    assert shape.flops_per_pair == flops_per_pair(adapter) < whole.flops_per_pair
    assert adapter.adapter is not None
    write_adapter(tmp_path, adapter.model, adapter.adapter)
    # Beside the numbers the file has the names of its tensors.
    assert 0 < (tmp_path / ADAPTER_WEIGHTS).stat().st_size - shape.learnt_bytes < 150 * len(learnt) + 500


def test_an_adapter_that_has_no_room_is_one_line() -> None:
    with pytest.raises(ModeError, match="rank: 4000 exceeds every layer"):
        shape_of(VIT, 16, adapter=AdapterParams(rank=4_000))


def test_forward_and_backward_are_three_times_forward() -> None:
    shape = shape_of(ModelParams(name="ViT-B-32"))
    forward = shape.flops_per_image + shape.flops_per_text
    assert shape.flops_per_pair == pytest.approx(3 * forward, rel=0.03)
    assert shape.parameters == pytest.approx(151.3e6, rel=1e-3)


def test_the_backward_pass_of_an_adapter_has_no_gradients_of_frozen_weights() -> None:
    """A forward pass, as much for the gradients of what layers are given, and little more, where a model has three."""
    whole = shape_of(ModelParams(name="ViT-B-32"), adapter=AdapterParams(rank=2))
    assert whole.adapter is not None
    assert whole.adapter.flops_per_pair == pytest.approx(whole.flops_per_pair * 2 / 3, rel=0.03)


def test_an_unknown_model_is_one_line() -> None:
    with pytest.raises(ModeError, match="open_clip knows no model 'ViT-Z'"):
        shape_of(ModelParams(name="ViT-Z"))


def test_image_size_is_the_configurations() -> None:
    assert image_size_of(ModelParams(name="ViT-L-14-336")) == 336
