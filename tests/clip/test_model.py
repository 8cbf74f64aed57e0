from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from mode.checksums import write_manifest
from mode.clip.model import build_model, load_model, save_model
from mode.errors import ModeError
from mode.params import ImageParams, ModelParams

CAPTIONS = ["a red dog", "a blue dog", "Two zebras, one crossing!", "the dog's end"]
IMAGE = ImageParams(size=32)


def test_end_has_the_highest_id_and_survives_the_cut(resnet: ModelParams) -> None:
    clip = build_model(resnet, IMAGE, CAPTIONS, random_seed=0)
    ids = clip.tokenizer(["", "a red dog " * 20])
    assert ids.shape == (2, 8)
    assert ids.dtype == torch.int64
    end = ids.max()
    assert (ids == end).sum(dim=1).tolist() == [1, 1]
    assert ids[1, -1] == end
    assert ids[0].tolist() == [2, end, 0, 0, 0, 0, 0, 0]


def test_plain_open_clip_opens_the_folder_and_predicts_the_same(resnet: ModelParams, tmp_path: Path) -> None:
    clip = build_model(resnet, IMAGE, CAPTIONS, random_seed=0)
    clip.model.eval()
    save_model(tmp_path / "model", clip, {"name": "seed"})
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    theirs.eval()
    ours = load_model(tmp_path / "model")
    ours.model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")
    texts = ["a red dog", "Zebras crossing", "unseen words only", ""]
    assert (tokenizer(texts) == clip.tokenizer(texts)).all()
    images = transform(Image.new("RGB", (50, 40), (200, 30, 60)))[None]
    assert images.shape == (1, 3, 32, 32)
    with torch.no_grad():
        for other in (theirs, ours.model):
            assert torch.equal(other.encode_image(images), clip.model.encode_image(images))
            assert torch.equal(other.encode_text(tokenizer(texts)), clip.model.encode_text(tokenizer(texts)))
            assert torch.equal(other.logit_scale, clip.model.logit_scale)
    assert ours.card == {"name": "seed"}
    assert (ours.model_cfg, ours.preprocess_cfg) == (clip.model_cfg, clip.preprocess_cfg)
    assert transform.transforms[-1].mean == list(IMAGE.mean)


def test_a_folder_is_replaced_as_a_whole(resnet: ModelParams, tmp_path: Path) -> None:
    clip = build_model(resnet, IMAGE, CAPTIONS, random_seed=0)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    save_model(tmp_path / "model", clip, {})
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "card.json",
    }


def test_weights_depend_on_the_seed_alone(resnet: ModelParams) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build_model(resnet, IMAGE, CAPTIONS, random_seed=1).model.state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    again = build_model(resnet, IMAGE, CAPTIONS, random_seed=1).model.state_dict()
    other = build_model(resnet, IMAGE, CAPTIONS, random_seed=2).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_name_of_open_clip_with_its_own_tokenizer(tmp_path: Path) -> None:
    clip = build_model(ModelParams(name="ViT-S-32-alt"), ImageParams(size=64), None, random_seed=0)
    assert clip.model.visual.image_size == (64, 64)
    assert clip.tokenizer(["a dog"]).shape == (1, 77)
    save_model(tmp_path / "model", clip, {})
    assert (load_model(tmp_path / "model").tokenizer(["a dog"]) == open_clip.tokenize(["a dog"])).all()


def test_a_configuration_file(resnet: ModelParams, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(resnet.config))
    clip = build_model(ModelParams(name=str(file), tokenizer="words"), IMAGE, CAPTIONS, random_seed=0)
    assert clip.model.context_length == 8


def test_bf16_keeps_norms_in_float32(vit: ModelParams) -> None:
    model = build_model(vit, IMAGE, CAPTIONS, random_seed=0, precision="bf16").model
    assert model.visual.conv1.weight.dtype == torch.bfloat16
    assert model.ln_final.weight.dtype == torch.float32


def test_unusable_configurations_are_refused(resnet: ModelParams, tmp_path: Path) -> None:
    assert resnet.config is not None
    cases = [
        (ModelParams(name="ViT-nope"), "open_clip knows no model 'ViT-nope'"),
        (
            ModelParams(name="hf-hub:some/model"),
            "'hf-hub:some/model' names trained weights",
        ),
        (ModelParams(name=f"local-dir:{tmp_path}"), "names trained weights"),
        (ModelParams(name="ViT-B-32:openai"), "names trained weights"),
        (ModelParams(name=str(tmp_path / "none.json")), r"none\.json: cannot be read as JSON"),
        (ModelParams(config={"embed_dim": 3}), "lacks vision_cfg, text_cfg"),
        (ModelParams(config={**resnet.config, "embed_dimension": 3}, tokenizer="words"), "embed_dimension"),
        (ModelParams(config={**resnet.config, "text_cfg": {"vocab_size": 300}}), "vocab_size"),
    ]
    for params, message in cases:
        with pytest.raises(ModeError, match=message):
            build_model(params, IMAGE, CAPTIONS, random_seed=0)


def test_what_is_no_model_folder_is_refused(resnet: ModelParams, tmp_path: Path) -> None:
    with pytest.raises(ModeError, match="not a model folder"):
        load_model(tmp_path / "none")
    save_model(tmp_path / "model", build_model(resnet, IMAGE, CAPTIONS, random_seed=0), {})
    (tmp_path / "model" / "open_clip_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModeError, match="open_clip cannot open it"):
        load_model(tmp_path / "model")


def test_a_flipped_bit_in_the_weights_is_named(resnet: ModelParams, tmp_path: Path) -> None:
    save_model(tmp_path, build_model(resnet, IMAGE, CAPTIONS, random_seed=0), {})
    write_manifest(tmp_path)
    load_model(tmp_path)
    weights = bytearray((tmp_path / "open_clip_model.safetensors").read_bytes())
    weights[-5] ^= 1
    (tmp_path / "open_clip_model.safetensors").write_bytes(weights)
    with pytest.raises(ModeError, match=r"open_clip_model\.safetensors: damaged"):
        load_model(tmp_path)
