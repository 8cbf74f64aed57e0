"""Folders of adapters: written, opened beside their base, and refused if they are anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mode.checksums import write_manifest
from mode.clip.folder import WEIGHTS, base_of, is_model
from mode.clip.lora import base_state
from mode.clip.model import Clip, folded, load_model, load_models, save_model
from mode.clip.pretrained import open_pretrained
from mode.embedding.base import load_embedder
from mode.embedding.open_clip import OpenClipEmbedder
from mode.errors import ModeError
from mode.files import sha256_of
from mode.params import ModelParams
from tests.adapters import CAPTIONS, write_adapter, write_base
from tests.training.conftest import RESNET

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    seed = write_base(root / "seed", ModelParams(config=RESNET, tokenizer="words"))
    for number in range(2):
        write_adapter(root / f"expert-{number}", seed, number)
    return root


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    """A folder with `seed`, `expert-0`, `expert-1`."""
    return shutil.copytree(made, tmp_path / "models")


def features(clip: Clip) -> list[Tensor]:
    with torch.no_grad():
        model = clip.model.eval()
        return [model.encode_image(IMAGES), model.encode_text(clip.tokenizer(CAPTIONS)), model.logit_scale]


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_folder_is_opened_beside_its_base(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    seed = write_base(tmp_path / "seed", request.getfixturevalue(kind))
    written = write_adapter(tmp_path / "expert", seed)
    assert {path.name for path in (tmp_path / "expert").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "card.json",
    }
    opened = load_model(tmp_path / "expert")
    assert opened.card == {"name": "expert"}
    assert opened.adapter == written.adapter
    assert opened.model_cfg == load_model(seed).model_cfg
    for ours, theirs, others in zip(features(opened), features(written), features(load_model(seed)), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, others, rtol=1e-3)
    assert base_of(tmp_path / "expert") == seed
    assert base_of(seed) is None
    assert is_model(tmp_path / "expert")
    assert is_model(seed)
    assert not is_model(tmp_path)
    by_name = open_pretrained(str(tmp_path / "expert"), "embedding.name")
    torch.testing.assert_close(features(by_name)[1], features(opened)[1])


def test_the_same_adapter_is_the_same_bytes(models: Path) -> None:
    write_adapter(models / "again", models / "seed", 0)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (models / "again" / name).read_bytes() == (models / "expert-0" / name).read_bytes()


def test_models_that_are_opened_together_share_their_base(models: Path) -> None:
    folders = {path.name: path for path in sorted(models.iterdir())}
    together = load_models(folders)
    for name, folder in folders.items():
        for ours, theirs in zip(features(together[name]), features(load_model(folder)), strict=True):
            torch.testing.assert_close(ours, theirs)
    states = [base_state(clip.model) for clip in together.values()]
    apart = {name for name in states[0] if len({state[name].data_ptr() for state in states}) > 1}
    assert apart == {"logit_scale"}


def test_a_folded_adapter_is_a_whole_model(models: Path, tmp_path: Path) -> None:
    clip = load_model(models / "expert-0")
    save_model(tmp_path / "whole", folded(clip), clip.card)
    opened = load_model(tmp_path / "whole")
    assert opened.adapter is None
    assert load_file(tmp_path / "whole" / WEIGHTS).keys() == load_file(models / "seed" / WEIGHTS).keys()
    for ours, theirs in zip(features(opened), features(clip), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert folded(opened) is opened


def test_bfloat16_opens_with_rounded_weights(models: Path) -> None:
    clip = load_model(models / "expert-0", precision="bf16")
    with torch.no_grad():
        rounded = clip.model.eval().encode_text(clip.tokenizer(CAPTIONS)).float()
    assert torch.cosine_similarity(rounded, features(load_model(models / "expert-0"))[1]).min() > 0.99


def configuration(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "adapter_config.json").read_text())
        edit(content)
        (folder / "adapter_config.json").write_text(json.dumps(content))

    return change


def tensors(
    edit: Callable[[dict[str, Tensor]], object], metadata: dict[str, str] | None = None
) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        content = load_file(path)
        edit(content)
        save_file(content, path, metadata or {"base_sha256": sha256_of(folder.parent / "seed" / WEIGHTS)})

    return change


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


FIRST = "base_model.model.transformer.resblocks.0.mlp.c_fc.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"adapter_model\.safetensors: cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not the configuration of a LoRA"),
        (lambda folder: (folder / "evil.py").write_text("1"), "a model folder with code"),
        (configuration(lambda it: it.update(auto_map={"A": "evil.A"})), "`auto_map` names code"),
        (
            configuration(lambda it: it.update(auto_mapping={"base_model_class": "CLIP", "parent_library": "evil"})),
            "auto_mapping: .* not known to be harmless",
        ),
        (configuration(lambda it: it.update(megatron_core="evil.core")), "megatron_core: evil.core: not known"),
        (configuration(lambda it: it.update(eva_config={"rho": 2})), "eva_config: .*: not known"),
        (configuration(lambda it: it.update(lora_dropout=0.5)), "lora_dropout: 0.5: not known"),
        (configuration(lambda it: it.update(rank_pattern={"attn": 10**9})), "rank_pattern: .*: not known"),
        (configuration(lambda it: it.update(some_new_key="x")), "some_new_key: x: not known"),
        (configuration(lambda it: it.update(peft_type="PREFIX_TUNING")), "not the configuration of a LoRA"),
        (configuration(lambda it: it.update(r=0)), "not the configuration of a LoRA with a rank of at least 1"),
        (configuration(lambda it: it.update(r=True)), "with a rank of at least 1"),
        (configuration(lambda it: it.update(r=10**9)), "has no room for rank 1000000000"),
        (configuration(lambda it: it.update(r=3)), r"lora_A.weight is \[4, "),
        (configuration(lambda it: it.update(lora_alpha=float("nan"))), "lora_alpha: nan is not possible"),
        (configuration(lambda it: it.update(lora_alpha="8")), "lora_alpha: 8 is not possible"),
        *(
            (
                configuration(lambda it, name=name: it.update(base_model_name_or_path=name)),
                "is no model beside this one, such as ../seed",
            )
            for name in (
                "openai/clip-vit-base-patch32",
                "/etc",
                "../../elsewhere",
                "..",
                "../",
                "../a/b",
                None,
                ["../seed"],
            )
        ),
        (
            configuration(lambda it: it.update(base_model_name_or_path="../expert-1")),
            "expert-1, which is no model folder",
        ),
        (configuration(lambda it: it.update(base_model_name_or_path="../none")), "none, which is no model folder"),
        (tensors(lambda it: it.pop(FIRST)), r"lacks|has"),
        (tensors(lambda it: it.clear()), "adapts no layer"),
        (tensors(lambda it: it.update({FIRST: torch.zeros(4, 99)})), r"c_fc.lora_A.weight is \[4, 99\], but in seed"),
        (tensors(lambda it: it.update({FIRST: it[FIRST].int()})), "c_fc.lora_A.weight is"),
        (
            tensors(lambda it: it.update({"base_model.model.visual.conv1.weight": torch.zeros(1)})),
            "has 'visual.conv1.w",
        ),
        (
            tensors(lambda it: it.update({"base_model.model.no.such.lora_A.weight": torch.zeros(4, 4)})),
            "does not fit seed: adapter: 'no.such' is no layer that can be adapted",
        ),
        (tensors(lambda _: None, {"format": "pt"}), "does not say which weights it is an adapter of"),
        (tensors(lambda _: None, {"base_sha256": "ab" * 32}), "an adapter of another base than .*abababababab"),
    ],
)
def test_what_is_no_adapter_of_this_base_is_refused_in_one_line(
    damage: Callable[[Path], object], message: str, models: Path
) -> None:
    damage(models / "expert-0")
    with pytest.raises(ModeError, match=message) as error:
        load_model(models / "expert-0")
    assert "\n" not in str(error.value)
    assert "expert-0" in str(error.value)


def test_an_adapter_of_another_base_is_refused_by_both_names(models: Path, resnet: ModelParams) -> None:
    shutil.rmtree(models / "seed")
    write_base(models / "seed", resnet, random_seed=9)
    with pytest.raises(
        ModeError, match=r"expert-0: an adapter of another base than .*models/seed: of weights \w{12}"
    ) as e:
        load_model(models / "expert-0")
    assert "\n" not in str(e.value)


def test_a_damaged_file_is_noticed_by_its_checksum(models: Path) -> None:
    write_manifest(models / "expert-0")
    load_model(models / "expert-0")
    content = bytearray((models / "expert-0/adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (models / "expert-0/adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ModeError, match=r"adapter_model\.safetensors: damaged"):
        load_model(models / "expert-0")


def test_an_embedder_keeps_an_adapter_as_a_whole_model(models: Path, tmp_path: Path) -> None:
    """Its folder has no base beside it."""
    texts = ["a red dog", "a zebra"]
    embedder = OpenClipEmbedder.open(str(models / "expert-0"), device="cpu", batch_size=8)
    embedder.save(tmp_path / "elsewhere/embedder")
    shutil.rmtree(models)
    again = load_embedder(tmp_path / "elsewhere/embedder", device="cpu")
    np.testing.assert_allclose(again.encode(texts), embedder.encode(texts), atol=1e-4)
