"""Which layers learn and how fast, on every kind of tower."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from mode.clip.model import build_model
from mode.errors import ModeError
from mode.params import ImageParams, ModelParams, TrainingParams
from mode.training.layers import depths, eval_locked, lock, rates
from mode.training.learner import adamw

TEXT = {"context_length": 8, "width": 16, "heads": 2, "layers": 2}
VIT = {"embed_dim": 16, "vision_cfg": {"layers": 3, "width": 16, "head_width": 8, "patch_size": 16}, "text_cfg": TEXT}
RESNET = {**VIT, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32}}
TIMM = {
    **VIT,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": 32},
}


def network(config: dict[str, Any]) -> open_clip.CLIP:
    params = ModelParams(config=config, tokenizer="words")
    return build_model(params, ImageParams(size=32), ["a dog"], random_seed=0).model


def test_a_vit_is_stem_blocks_and_head() -> None:
    places = depths(network(VIT))
    assert places["visual.conv1.weight"] == ("image", 0, 5)
    assert places["visual.positional_embedding"] == places["visual.ln_pre.bias"] == ("image", 0, 5)
    assert places["visual.transformer.resblocks.0.attn.in_proj_weight"] == ("image", 1, 5)
    assert places["visual.transformer.resblocks.2.mlp.c_fc.weight"] == ("image", 3, 5)
    assert places["visual.ln_post.weight"] == places["visual.proj"] == ("image", 4, 5)
    assert places["token_embedding.weight"] == places["positional_embedding"] == ("text", 0, 4)
    assert places["transformer.resblocks.1.ln_1.weight"] == ("text", 2, 4)
    assert places["ln_final.weight"] == places["text_projection"] == ("text", 3, 4)
    assert "logit_scale" not in places


def test_a_resnet_is_stem_stages_and_head() -> None:
    places = depths(network(RESNET))
    assert places["visual.conv1.weight"] == places["visual.bn3.bias"] == ("image", 0, 6)
    assert places["visual.layer1.0.conv1.weight"] == ("image", 1, 6)
    assert places["visual.layer4.0.bn2.weight"] == ("image", 4, 6)
    assert places["visual.attnpool.c_proj.weight"] == places["visual.attnpool.positional_embedding"] == ("image", 5, 6)


@pytest.mark.parametrize("config", [VIT, RESNET, TIMM], ids=["vit", "resnet", "timm"])
def test_every_parameter_of_a_tower_has_its_place(config: dict[str, Any]) -> None:
    model = network(config)
    places = depths(model)
    assert {name for name, _ in model.named_parameters()} - places.keys() == {"logit_scale"}
    for tower in ("image", "text"):
        own = [(depth, total) for each, depth, total in places.values() if each == tower]
        assert {depth for depth, _ in own} == set(range(own[0][1])), "no group is empty"


def test_timms_blocks_are_found() -> None:
    places = depths(network(TIMM))
    assert places["visual.trunk.patch_embed.proj.weight"][1] == 0
    assert places["visual.trunk.blocks.0.mlp.fc1.weight"][1] == 1
    last = places["visual.head.proj.weight"]
    assert last[1] == last[2] - 1


def test_a_locked_tower_keeps_its_last_groups() -> None:
    model = network(VIT)
    lock(model, TrainingParams(unlocked_image_groups=2, unlocked_text_groups=0))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    image = {name for name in learning if name.startswith("visual.")}
    assert {depths(model)[name][1] for name in image} == {3, 4}
    assert learning - image == {"logit_scale"}
    assert len(adamw(model, TrainingParams()).param_groups) == 2


def test_more_groups_than_there_are_cannot_stay_unlocked() -> None:
    with pytest.raises(ModeError, match=r"unlocked_image_groups: 6, but the image tower has 5"):
        lock(network(VIT), TrainingParams(unlocked_image_groups=6))


def test_statistics_of_a_locked_batch_norm_stay() -> None:
    model = network(RESNET)
    lock(model, TrainingParams(unlocked_image_groups=1))
    eval_locked(model.train())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    before = norms[0].running_mean.clone()  # type: ignore[operator]
    model.encode_image(torch.rand(2, 3, 32, 32))
    assert torch.equal(before, norms[0].running_mean)  # type: ignore[arg-type]


def test_a_group_learns_slower_the_deeper_it_lies() -> None:
    got = {name: rate for name, _, rate in rates(network(VIT), 0.5)}
    assert got["visual.proj"] == got["text_projection"] == got["logit_scale"] == 1.0
    assert got["visual.transformer.resblocks.2.ln_1.weight"] == 0.5
    assert got["visual.conv1.weight"] == 0.5**4
    assert got["token_embedding.weight"] == 0.5**3


def test_without_decay_the_optimiser_has_its_two_groups_in_their_order() -> None:
    model = network(VIT)
    plain, decayed = adamw(model, TrainingParams()).param_groups
    own = list(model.parameters())
    assert [id(each) for each in plain["params"]] == [id(each) for each in own if each.ndim < 2]
    assert [id(each) for each in decayed["params"]] == [id(each) for each in own if each.ndim >= 2]
    assert (plain["weight_decay"], decayed["weight_decay"], plain["rate"]) == (0.0, 0.2, 1.0)
