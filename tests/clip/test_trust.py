"""Folders and configurations of others describe a model, and do nothing else."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import open_clip
import pytest
from open_clip.coca_model import MultimodalCfg

from mode.clip.model import build_model, load_model, save_model
from mode.clip.pretrained import open_pretrained
from mode.clip.trust import _SECTIONS, check_configuration, check_folder, check_preprocessing
from mode.embedding.base import build_embedder
from mode.errors import ModeError
from mode.params import EmbeddingParams, ImageParams, ModelParams

IMAGE = ImageParams(size=32)
MODEL: dict[str, Any] = {"embed_dim": 8, "vision_cfg": {"layers": 1}, "text_cfg": {"layers": 1}}


@pytest.fixture
def folder(resnet: ModelParams, tmp_path: Path) -> Path:
    """A model folder as it should be."""
    save_model(tmp_path / "model", build_model(resnet, IMAGE, ["a red dog"], random_seed=0), {})
    return tmp_path / "model"


def change(file: Path, edit: Callable[[Any], None]) -> None:
    """Edit a JSON file."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def plant(folder: Path) -> Path:
    """Add code to a folder with a tokenizer; return the file that the code would write when it runs."""
    mark = folder.parent / "it-ran"
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from transformers import PreTrainedTokenizerFast\nclass Evil(PreTrainedTokenizerFast): pass\n"
    )
    change(folder / "tokenizer_config.json", lambda it: it.update(auto_map={"AutoTokenizer": [None, "evil.Evil"]}))
    return mark


@pytest.mark.parametrize(
    ("section", "config"),
    [
        ("vision_cfg", open_clip.CLIPVisionCfg),
        ("text_cfg", open_clip.CLIPTextCfg),
        ("multimodal_cfg", MultimodalCfg),
    ],
)
def test_what_passes_are_the_settings_that_open_clip_has(section: str, config: type) -> None:
    """A later open_clip may have more: look at what it does before it is listed."""
    own = dict.fromkeys(field.name for field in fields(config))
    assert _SECTIONS[section] == own.keys()
    check_configuration(MODEL | {section: own}, "model")
    with pytest.raises(ModeError, match="unknown key 'another'"):
        check_configuration(MODEL | {section: {**own, "another": None}}, "model")


def test_a_tokenizer_that_brings_code_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = plant(folder)
    trusting = {"tokenizer_kwargs": {"trust_remote_code": True}}
    change(folder / "open_clip_config.json", lambda it: it["model_cfg"]["text_cfg"].update(trusting))
    for attempt in (load_model, lambda path: open_pretrained(str(path), "embedding.name")):
        with pytest.raises(ModeError, match=r"evil\.py: a model folder with code"):
            attempt(folder)
    (folder / "evil.py").unlink()  # it may lie elsewhere: `auto_map` can name another repository
    with pytest.raises(ModeError, match=r"tokenizer_config\.json: `auto_map` names code"):
        load_model(folder)
    change(folder / "tokenizer_config.json", lambda it: it.pop("auto_map"))
    with pytest.raises(ModeError, match=r"tokenizer_kwargs: unknown key 'trust_remote_code'"):
        load_model(folder)
    change(folder / "open_clip_config.json", lambda it: it["model_cfg"]["text_cfg"].pop("tokenizer_kwargs"))
    assert load_model(folder).dimensions
    assert not mark.exists()


def test_an_encoder_that_brings_code_is_refused(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "encoder"
    shutil.copytree(bert, folder)
    mark = plant(folder)
    params = EmbeddingParams(kind="transformers", name=str(folder))
    with pytest.raises(ModeError, match=r"evil\.py: a model folder with code"):
        build_embedder(params, [], random_seed=0)
    (folder / "evil.py").unlink()
    with pytest.raises(ModeError, match="`auto_map` names code"):
        build_embedder(params, [], random_seed=0)
    assert not mark.exists()


def test_a_configuration_in_params_is_no_way_around(resnet: ModelParams) -> None:
    config = copy.deepcopy(resnet.config)
    assert config is not None
    config["text_cfg"] |= {"hf_tokenizer_name": "some/repository", "tokenizer_kwargs": {"trust_remote_code": True}}
    with pytest.raises(ModeError, match=r"model: text_cfg\.tokenizer_kwargs: unknown key 'trust_remote_code'"):
        build_model(ModelParams(config=config), IMAGE, None, random_seed=0)


@pytest.mark.parametrize("name", open_clip.list_models())
def test_open_clips_own_configurations_pass(name: str) -> None:
    configuration = open_clip.get_model_config(name)
    assert check_configuration(configuration, name) == configuration


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}, "unknown key 'bpe_path'"),
        ("text_cfg", {"tokenizer_kwargs": {"code_revision": "x"}}, "unknown key 'code_revision'"),
        ("text_cfg", {"hf_model_name": "some/repository"}, "hf_model_name: 'some/repository' is not known"),
        ("text_cfg", {"hf_model_name": "/tmp/encoder"}, "is not known to be harmless"),
        ("text_cfg", {"vocab_size": 10**12}, "vocab_size: 1000000000000 is not possible"),
        ("text_cfg", {"context_length": float("nan")}, "context_length: nan is not possible"),
        ("text_cfg", {"width": {"a": 1}}, "width: .* is not possible"),
        ("text_cfg", {"norm_kwargs": {"device": "meta"}}, "unknown key 'device'"),
        ("vision_cfg", {"timm_model_name": "hf-hub:some/model"}, "timm has no architecture 'hf-hub:some/model'"),
        ("vision_cfg", {"timm_model_name": "local-dir:/tmp/model"}, "timm has no architecture"),
        ("vision_cfg", {"timm_model_name": ["resnet50"]}, "timm has no architecture"),
        ("vision_cfg", {"image_size": [10**6, 10**6]}, "image_size: .* is not possible"),
        ("vision_cfg", {"a\nb\x1b[31m": 1}, r"unknown key 'a\\nb\\x1b\[31m'"),
    ],
)
def test_what_else_a_configuration_could_do_is_refused(section: str, change: dict[str, Any], message: str) -> None:
    configuration = {**MODEL, section: {**MODEL[section], **change}}
    with pytest.raises(ModeError, match=message) as refused:
        check_configuration(configuration, "model")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("configuration", [None, [], "text", {"embed_dim": 8}, {**MODEL, "text_cfg": [1]}])
def test_what_is_no_configuration_is_refused(configuration: object) -> None:
    with pytest.raises(ModeError, match=r"lacks|no mapping"):
        check_configuration(configuration, "model")


@pytest.mark.parametrize(
    "preprocessing",
    [[], {"size": 10**9}, {"mean": [0.5]}, {"std": [1, 0, 1]}, {"mean": ["a" * 1000] * 3}, {"fill_color": {}}],
)
def test_preprocessing_out_of_proportion_is_refused(preprocessing: object) -> None:
    with pytest.raises(ModeError, match="preprocess_cfg"):
        check_preprocessing(preprocessing, "model")


def test_a_configuration_larger_than_its_weights_takes_no_memory(folder: Path) -> None:
    # 400 GB of weights, of which the file holds not one.
    wide = {"width": 16_384, "layers": 128}
    change(folder / "open_clip_config.json", lambda it: it["model_cfg"]["text_cfg"].update(wide))
    with pytest.raises(ModeError, match="they do not belong together"):
        load_model(folder)


@pytest.mark.parametrize("name", ["open_clip_config.json", "card.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, "{", "\x00", "[]", "3"])
def test_json_that_is_none_is_one_line(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ModeError) as refused:
        load_model(folder)
    assert "\n" not in str(refused.value)


def test_a_word_called_auto_map_is_no_code(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"auto_map": 3}')
    check_folder(tmp_path)
