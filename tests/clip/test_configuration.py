"""What is known of a model folder without open_clip is what open_clip knows."""

from __future__ import annotations

from dataclasses import asdict

import open_clip
from open_clip.transform import PreprocessCfg

from mode.clip.configuration import IMAGE_SIZE, Preprocessing, preprocessing_of


def test_defaults_are_those_of_open_clip() -> None:
    assert asdict(Preprocessing()) == asdict(PreprocessCfg())
    assert open_clip.CLIPVisionCfg().image_size == IMAGE_SIZE


def test_the_image_size_is_that_of_the_tower_unless_the_folder_has_one() -> None:
    assert preprocessing_of({}, 32) == Preprocessing(size=32)
    assert preprocessing_of({"size": 24, "fill_color": 7}, 32) == Preprocessing(size=24, fill_color=7)


def test_what_open_clip_does_not_know_is_left_out() -> None:
    assert preprocessing_of({"num_channels": 3, "interpolation": "bilinear"}, 32) == Preprocessing(
        size=32, interpolation="bilinear"
    )
