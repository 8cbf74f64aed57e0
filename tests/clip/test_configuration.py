"""What is known of a model folder without open_clip is what open_clip knows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import open_clip
import pytest
from open_clip.transform import PreprocessCfg

from mode.clip.configuration import IMAGE_SIZE, Preprocessing, check_architecture, preprocessing_of, read_card
from mode.errors import ModeError
from mode.params import ModelParams


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff{}", "cannot be read"),
        (b"[]", "not a card"),
    ],
)
def test_a_card_that_is_missing_or_damaged_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(ModeError, match=rf"card\.json: {message}"):
        read_card(tmp_path)


@pytest.mark.parametrize("name", [*open_clip.list_models(), "theirs.json", None])
def test_every_architecture_of_open_clip_is_known(name: str | None) -> None:
    check_architecture(ModelParams(name=name))


@pytest.mark.parametrize("name", ["ViT-B-33", "vit-b-32", "../model_configs/ViT-B-32", ""])
def test_a_name_that_open_clip_does_not_know_is_refused_before_it_is_used(name: str) -> None:
    with pytest.raises(ModeError, match=rf"^model.name: open_clip knows no model '{name}' \(.*list_models"):
        check_architecture(ModelParams(name=name))
