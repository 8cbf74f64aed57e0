from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from mode.checksums import check_manifest
from mode.cli import main
from mode.clip.export import export_model
from mode.clip.model import load_model
from mode.errors import ModeError
from mode.params import ModelParams
from tests.adapters import CAPTIONS, write_adapter, write_base

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def models(resnet: ModelParams, tmp_path: Path) -> Path:
    seed = write_base(tmp_path / "models/seed", resnet)
    write_adapter(tmp_path / "models/expert-0", seed)
    return tmp_path / "models"


def test_plain_open_clip_opens_an_exported_adapter(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "elsewhere/whole"
    with pytest.raises(SystemExit) as ended:
        main(["export-model", "expert-0", str(folder), "--models", str(models)])
    assert ended.value.code == 0
    assert f"local-dir:{folder}" in capsys.readouterr().out
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    images = transform(Image.new("RGB", (50, 40), (200, 30, 60)))[None]
    ours = load_model(models / "expert-0").model.eval()
    theirs.eval()
    with torch.no_grad():
        for mine, other in (
            (ours.encode_image(images), theirs.encode_image(images)),
            (ours.encode_text(tokens), theirs.encode_text(tokens)),
            (ours.logit_scale, theirs.logit_scale),
        ):
            torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-5)
    assert load_model(folder).card == {"name": "expert-0"}
    assert check_manifest(folder)


def test_a_whole_model_is_exported_as_it_is(models: Path, tmp_path: Path) -> None:
    export_model(models, "seed", tmp_path / "copy")
    assert (tmp_path / "copy" / WEIGHTS).read_bytes() == (models / "seed" / WEIGHTS).read_bytes()


def test_what_cannot_be_exported_is_said_and_nothing_written(models: Path, tmp_path: Path) -> None:
    for name in ("expert-7", "../models/seed", "", "."):
        with pytest.raises(ModeError, match=f"no model is called '{name}' .there are: expert-0, seed"):
            export_model(models, name, tmp_path / "copy")
    with pytest.raises(ModeError, match="no model is called 'seed'"):
        export_model(tmp_path / "none", "seed", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    for taken in (tmp_path / "full", tmp_path / "full/mine.txt"):
        with pytest.raises(ModeError, match="not empty"):
            export_model(models, "expert-0", taken)
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
