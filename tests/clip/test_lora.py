from __future__ import annotations

import copy
import warnings

import open_clip
import pytest
import torch
from peft import get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from mode.clip.lora import (
    Lora,
    SelfAttention,
    adaptable_layers,
    add_deltas,
    base_state,
    choose_layers,
    delta_layers,
    delta_of,
    fold,
    own_tensors,
    share,
)
from mode.clip.model import Clip, build_model
from mode.errors import ModeError
from mode.params import ImageParams, ModelParams

CAPTIONS = ["a red dog", "a blue dog", "Two zebras, one crossing!"]
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
#: A transformer of timm, with CLIP's text tower beside it.
TIMM = {
    "embed_dim": 16,
    "vision_cfg": {
        "timm_model_name": "test_vit",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
    },
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    "custom_text": True,
}


def clip_of(model: ModelParams) -> Clip:
    clip = build_model(model, ImageParams(size=32), CAPTIONS, random_seed=0)
    clip.model.eval()
    return clip


@pytest.fixture
def timm() -> ModelParams:
    return ModelParams(config=TIMM, tokenizer="words")


def layers_of(clip: Clip) -> dict[str, int]:
    return adaptable_layers(clip.model, clip.tokenizer([""]))


def with_deltas(clip: Clip, rank: int = 4, alpha: float = 8.0, targets: list[str] | None = None) -> open_clip.CLIP:
    """A network that shares the parameters of `clip` and has random deltas."""
    lora = Lora(rank, alpha, choose_layers(layers_of(clip), rank, targets))
    model = add_deltas(share(clip.model), lora, random_seed=1).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    return model


def features(model: nn.Module, clip: Clip) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model.encode_image(IMAGES), model.encode_text(clip.tokenizer(CAPTIONS))  # type: ignore[operator]


def test_what_can_be_adapted_in_a_vit(vit: ModelParams) -> None:
    """Worked out by hand: widths 16, an MLP of 64, patches of 16 x 16 x 3."""
    block = {"attn": 16, "mlp.c_fc": 16, "mlp.c_proj": 16}
    image = {f"visual.transformer.resblocks.0.{name}": room for name, room in block.items()}
    text = {f"transformer.resblocks.0.{name}": room for name, room in block.items()}
    assert layers_of(clip_of(vit)) == {"visual.conv1": 16, **image, **text}


def test_what_can_be_adapted_in_a_resnet(resnet: ModelParams) -> None:
    """All convolutions, and nothing of the attention pooling: it uses weights of layers that it never calls."""
    clip = clip_of(resnet)
    found = [name for name in layers_of(clip) if name.startswith("visual.")]
    convolutions = [name for name, module in clip.model.visual.named_modules() if isinstance(module, nn.Conv2d)]
    assert found == [f"visual.{name}" for name in convolutions]
    assert layers_of(clip)["visual.conv1"] == 4  # from 3 channels x 3 x 3 to 4
    assert any("attnpool" in name for name, module in clip.model.named_modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
def test_deltas_of_zero_change_nothing_and_others_are_added_to_the_weights(
    kind: str, request: pytest.FixtureRequest
) -> None:
    clip = clip_of(request.getfixturevalue(kind))
    before, state = features(clip.model, clip), {name: t.clone() for name, t in clip.model.state_dict().items()}
    names = choose_layers(layers_of(clip), 4, None)
    new = add_deltas(share(clip.model), Lora(4, 8.0, names)).eval()
    for ours, theirs in zip(features(new, clip), before, strict=True):
        torch.testing.assert_close(ours, theirs)
    changed = with_deltas(clip)
    plain = fold(changed)
    assert type(plain) is type(clip.model)
    assert list(plain.state_dict()) == list(state)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    # Naively: the factors' product by hand, for linear layers and convolutions alike.
    own = own_tensors(changed)
    for name, tensor in plain.state_dict().items():
        layer = name.removesuffix("in_proj_weight").removesuffix(".weight").removesuffix(".")
        layer = (
            layer.replace("attn.out_proj", "attn.base_layer.out_proj") if f"{layer}.lora_A.weight" not in own else layer
        )
        expected = state[name]
        if f"{layer}.lora_A.weight" in own and name.endswith("weight"):
            first, second = own[f"{layer}.lora_A.weight"], own[f"{layer}.lora_B.weight"]
            product = second.reshape(len(second), -1) @ first.reshape(len(first), -1)
            expected = expected + 8.0 / 4 * product.reshape(expected.shape)
            assert not torch.equal(tensor, state[name])
        torch.testing.assert_close(tensor, expected, msg=name)
    for ours, theirs, old in zip(features(changed, clip), features(plain, clip), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours, old, rtol=1e-2)
    assert all(torch.equal(tensor, state[name]) for name, tensor in clip.model.state_dict().items())


def test_the_base_does_not_drift_and_only_deltas_and_the_scale_learn(vit: ModelParams) -> None:
    clip = clip_of(vit)
    state = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    model = with_deltas(clip).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(3):
        image, text = model.encode_image(IMAGES), model.encode_text(clip.tokenizer(CAPTIONS))
        (model.logit_scale.exp() * image @ text.T).logsumexp(dim=1).sum().backward()
        optimizer.step()
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name or name == "logit_scale" for name in learning)
    assert all(dict(model.named_parameters())[name].grad.abs().sum() > 0 for name in learning)
    assert all(torch.equal(tensor, state[name]) for name, tensor in clip.model.state_dict().items())
    assert not torch.equal(model.logit_scale, clip.model.logit_scale)
    assert {name for name, tensor in base_state(model).items() if not torch.equal(tensor, state[name])} == {
        "logit_scale"
    }


def test_networks_share_the_parameters_also_after_a_move(resnet: ModelParams) -> None:
    clip = clip_of(resnet)
    models = [with_deltas(clip), with_deltas(clip)]
    for model in models:
        model.to(memory_format=torch.channels_last)
    first, second = map(base_state, models)
    apart = {name for name in first if first[name].data_ptr() != second[name].data_ptr()}
    assert apart == {"logit_scale"}


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_is_that_of_torch(batch_first: bool) -> None:
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    split = SelfAttention(whole)
    batch = torch.randn(5, 7, 16)
    tokens = 7 if batch_first else 5
    mask = torch.full((tokens, tokens), float("-inf")).triu(1)
    for given in (None, mask):
        expected = whole(batch, batch, batch, need_weights=False, attn_mask=given)[0]
        torch.testing.assert_close(split(batch, batch, batch, attn_mask=given)[0], expected)
    again = split.whole()
    assert all(ours is theirs for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True))
    torch.testing.assert_close(again(batch, batch, batch, attn_mask=mask)[0], expected)
    with pytest.raises(NotImplementedError):
        split(batch, batch.clone(), batch)


def test_bfloat16_computes_nearly_the_same(vit: ModelParams) -> None:
    clip = clip_of(vit)
    model = with_deltas(clip)
    exact = features(model, clip)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = features(model, clip)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert torch.cosine_similarity(ours.float(), theirs).min() > 0.999


def test_plain_peft_takes_the_tensors_by_their_names(vit: ModelParams) -> None:
    """But for what its attention makes of `out_proj`, whose delta peft 0.21 adds twice (huggingface/peft#3774)."""
    clip = clip_of(vit)
    names = choose_layers(layers_of(clip), 4, None)
    model = with_deltas(clip)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "out_proj.lora_B" in name:
                parameter.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it renames the base
        theirs = get_peft_model(copy.deepcopy(clip.model), Lora(4, 8.0, names).config("../seed"))
    own = {f"base_model.model.{name}": tensor for name, tensor in own_tensors(model).items()}
    assert set_peft_model_state_dict(theirs, own).unexpected_keys == []
    for ours, others in zip(features(model, clip), features(theirs.eval().base_model.model, clip), strict=True):
        torch.testing.assert_close(ours, others)


def test_first_deltas_follow_the_random_seed_and_leave_the_others_alone(vit: ModelParams) -> None:
    clip = clip_of(vit)
    lora = Lora(4, 8.0, choose_layers(layers_of(clip), 4, ["*.attn"]))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (own_tensors(add_deltas(share(clip.model), lora, seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(not tensor.any() for name, tensor in first.items() if ".lora_B." in name)


def test_targets_are_chosen_by_patterns(vit: ModelParams) -> None:
    found = layers_of(clip_of(vit))
    assert choose_layers(found, 16, None) == tuple(found)
    assert choose_layers(found, 4, ["visual.*.attn", "transformer.*.c_fc"]) == (
        "visual.transformer.resblocks.0.attn",
        "transformer.resblocks.0.mlp.c_fc",
    )
    with pytest.raises(
        ModeError, match=r"targets: '\*\.qkv' fits no layer that can be adapted \(this model has visual"
    ):
        choose_layers(found, 4, ["visual.*", "*.qkv"])
    with pytest.raises(ModeError, match=r"rank: 17 exceeds every layer, the largest has 16 \(set a lower rank\)"):
        choose_layers(found, 17, None)
    with pytest.raises(ModeError, match=r"rank: 17 exceeds visual\.conv1, whose smaller side is 16"):
        choose_layers(found, 17, ["*"])


def test_layers_without_room_are_left_out_unless_they_are_asked_for(resnet: ModelParams) -> None:
    found = layers_of(clip_of(resnet))
    assert set(found) - set(choose_layers(found, 8, None)) == {"visual.conv1", "visual.conv2"}


@pytest.mark.parametrize("name", ["", "visual", "visual.ln_pre", "transformer.resblocks.0.attn.out_proj", "none.of.it"])
def test_names_that_are_no_layer_are_refused(vit: ModelParams, name: str) -> None:
    with pytest.raises(ModeError, match="no layer that can be adapted"):
        add_deltas(clip_of(vit).model, Lora(2, 2.0, (name,)))


def test_deltas_by_the_name_of_the_weight(vit: ModelParams) -> None:
    clip = clip_of(vit)
    model = with_deltas(clip, targets=["*.attn"])
    deltas = delta_layers(model)
    assert set(deltas) == {
        f"{tower}transformer.resblocks.0.attn.{weight}"
        for tower in ("visual.", "")
        for weight in ("in_proj_weight", "out_proj.weight")
    }
    for name, tensor in fold(model).state_dict().items():
        expected = base_state(model)[name] + (delta_of(deltas[name]) if name in deltas else 0)
        torch.testing.assert_close(tensor, expected)
