"""Low-rank deltas (LoRA, arXiv 2106.09685) of a CLIP's layers: put into a network, taken out of it, folded into it.

The layers are peft's. Its layer for `nn.MultiheadAttention` is not used: it adds the delta to the weights before every
pass and takes it off again, so that frozen weights drift by rounding and no two models can share them, and it adds that
of the output projection twice (huggingface/peft#3774). Here a block's attention is cut into its two linear layers first
(`SelfAttention`), which computes the same and wraps as any layer does. The names in files are those that peft gives to
the layers of a plain open_clip model.

What has no layer of its own is not adapted and stays as in the base: embeddings of words and positions, the projections
behind the towers, biases and gains, and open_clip's attention pooling, which uses the weights of its layers without
calling them. BatchNorm keeps the base's statistics as well: they gained nothing when they followed an expert's pairs,
and without them a merge is a sum of deltas and needs no images. Logit scale and bias are a model's own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from mode.clip.device import without_numbers
from mode.errors import ModeError

#: peft's name for the only adapter of a model.
_NAME = "default"
_SCALARS = ("logit_scale", "logit_bias")
_PARTS = ("in_proj", "out_proj")


@dataclass(frozen=True)
class Lora:
    """Which layers have a delta `alpha / rank * B @ A`.

    Attributes:
        rank: rows of A and columns of B.
        alpha: the delta's scale, times the rank.
        layers: names of modules of the plain network, in the order of the alphabet; an attention is one of them.
    """

    rank: int
    alpha: float
    layers: tuple[str, ...]

    def config(self, base: str | None = None) -> LoraConfig:
        """The configuration that peft has of it for the plain network; `base`: where its weights lie."""
        return _config(self, self.layers, base)

    def unlike(self, given: Lora) -> str | None:
        """How `given` deltas differ from these, which training.adapter asks for, in words; None if they do not."""
        for name, its, asked in (("rank", given.rank, self.rank), ("alpha", given.alpha, self.alpha)):
            if its != asked:
                return f"of {name} {its:g}, but training.adapter asks for {asked:g}"
        if (layer := min({*given.layers} ^ {*self.layers}, default=None)) is None:
            return None
        if layer in self.layers:
            return f"without {layer}, which training.adapter adapts"
        return f"of {layer}, which training.adapter leaves out"


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a block, which attends to its own input, as two linear layers around the attention.

    It has the very same parameters: nothing is copied.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.batch_first = attention.num_heads, attention.batch_first
        self.in_proj = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out_proj = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """As of `nn.MultiheadAttention` where key and value are the query, and no weights are asked for."""
        if key is not query or value is not query or need_weights:
            raise NotImplementedError("attention to another input than its own")
        hidden = query if self.batch_first else query.transpose(0, 1)
        parts = self.in_proj(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # 3, b, heads, n, d
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask)
        result: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return (result if self.batch_first else result.transpose(0, 1)), None

    def whole(self) -> nn.MultiheadAttention:
        """The `nn.MultiheadAttention` of these layers, with the very same parameters."""
        width = self.out_proj.in_features
        attention = nn.MultiheadAttention(width, self.heads, batch_first=self.batch_first, device="meta")
        attention.in_proj_weight, attention.in_proj_bias = self.in_proj.weight, self.in_proj.bias  # type: ignore[assignment]
        attention.out_proj.weight, attention.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return attention.train(self.training)


def adaptable_layers(model: open_clip.CLIP, tokens: Tensor) -> dict[str, int]:
    """Every layer that can have a delta, in the order of the network: its name -> the largest rank it has room for.

    They are the linear layers and plain convolutions that are called when an image and a text are encoded, which one
    pass without numbers shows (on torch's `meta` device), and the attention of open_clip's blocks as a whole.

    Args:
        model: a plain network.
        tokens: int64 [1, context], any text.
    """
    probe = without_numbers(model).eval()
    whole = [name for name, module in probe.named_modules() if _is_plain_attention(probe, name, module)]
    _split(probe, whole)
    called: list[nn.Module] = []
    layers = {name: module for name, module in probe.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for layer in layers.values():
        layer.register_forward_hook(lambda module, *_: called.append(module))
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    dtype = next(parameter.dtype for parameter in probe.visual.parameters() if parameter.ndim > 1)
    with torch.no_grad():
        probe.encode_image(torch.empty(1, 3, height, width, dtype=dtype, device="meta"))
        probe.encode_text(tokens[:1].to("meta"))
    used = {id(module) for module in called}
    found: dict[str, int] = {}
    for name, layer in layers.items():
        if id(layer) in used and (room := _room(layer)):
            parent, _, last = name.rpartition(".")
            key = parent if parent in whole and last in _PARTS else name
            found[key] = min(room, found.get(key, room))
    return found


def choose_layers(found: dict[str, int], rank: int, targets: Sequence[str] | None) -> tuple[str, ...]:
    """The layers to adapt.

    Args:
        found: what `adaptable_layers` found.
        rank: of the deltas.
        targets: patterns such as `visual.*` or `*.attn`; None: every layer that has room for the rank.

    Raises:
        ModeError: a pattern that fits no layer, or a layer smaller than the rank.
    """
    if targets is None:
        chosen = [name for name, room in found.items() if rank <= room]
        if not chosen:
            largest = max(found.values(), default=0)
            what = f"training.adapter.rank: {rank} exceeds every layer, the largest has {largest}"
            raise ModeError(what, "set a lower rank")
        return tuple(chosen)
    for pattern in targets:
        if not any(fnmatchcase(name, pattern) for name in found):
            some = ", ".join([*found][:4])
            raise ModeError(
                f"training.adapter.targets: '{pattern}' fits no layer that can be adapted",
                f"this model has {some}{', ...' if len(found) > 4 else ''}",
            )
    names = [name for name in found if any(fnmatchcase(name, pattern) for pattern in targets)]
    if small := next((name for name in names if rank > found[name]), None):
        raise ModeError(
            f"training.adapter.rank: {rank} exceeds {small}, whose smaller side is {found[small]}",
            "set a lower rank, or targets without it",
        )
    return tuple(names)


def add_deltas(model: open_clip.CLIP, lora: Lora, random_seed: int = 0) -> open_clip.CLIP:
    """Put deltas of zero into a plain network, and freeze all but them and its logit scale and bias.

    Args:
        model: changed in place; its parameters stay the very same objects.
        lora: names only layers that are there and have room for the rank.
        random_seed: of the A matrices; the B matrices are zero.

    Returns:
        The same network.

    Raises:
        ModeError: a layer is not there, is not one that can be adapted, or is smaller than the rank.
    """
    modules = dict(model.named_modules())
    whole = [name for name in lora.layers if _is_plain_attention(model, name, modules.get(name))]
    for name in lora.layers:
        room = modules[name].embed_dim if name in whole else _room(modules.get(name))
        if not 1 <= lora.rank <= room:
            what = "is no layer that can be adapted" if not room else f"has no room for rank {lora.rank}"
            raise ModeError(f"adapter: '{name[:100]}' {what}")
    _split(model, whole)
    names = [name for name in lora.layers if name not in whole]
    names += [f"{name}.{part}" for name in whole for part in _PARTS]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        inject_adapter_in_model(_config(lora, names, None), model, _NAME)
    for scalar in _SCALARS:
        if isinstance(parameter := getattr(model, scalar, None), nn.Parameter):
            parameter.requires_grad_(True)
    return model


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a network with deltas does not have from its base: the very tensors, by the names that plain peft uses."""
    splits = _splits(model)
    own: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            layer, _, matrix = name.partition(".lora_")
            owner, _, part = layer.rpartition(".")
            if owner in splits:
                layer = owner if part == "in_proj" else f"{owner}.base_layer.{part}"
            own[f"{layer}.lora_{matrix.replace(f'.{_NAME}.', '.')}"] = tensor
        elif name in _SCALARS:
            own[name] = tensor
    return own


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """State of the plain network below the deltas, the very tensors by its own names; of a plain one all of it."""
    splits = _splits(model)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            module, _, last = name.replace(".base_layer.", ".").rpartition(".")
            owner, _, part = module.rpartition(".")
            plain = f"{owner}.in_proj_{last}" if owner in splits and part == "in_proj" else f"{module}.{last}"
            state[plain.removeprefix(".")] = tensor
    return state


def delta_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Name of a weight in the plain network's state -> the layer that knows its delta."""
    splits, layers = _splits(model), {}
    for name, layer in _lora_layers(model):
        owner, _, part = name.rpartition(".")
        layers[f"{owner}.in_proj_weight" if owner in splits and part == "in_proj" else f"{name}.weight"] = layer
    return layers


def delta_of(layer: LoraLayer) -> Tensor:
    """`alpha / rank * B @ A` in float32, of the shape of the layer's weight."""
    with torch.no_grad():
        delta: Tensor = layer.get_delta_weight(_NAME)  # type: ignore[attr-defined]  # of its subclasses
        return delta.float()


def share(model: open_clip.CLIP) -> open_clip.CLIP:
    """A copy of a plain network that has the very same parameters and buffers, but its own logit scale and bias.

    Parameters that are one object stay one when either network is moved to another device or memory format.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    return copy.deepcopy(model, {id(each): each for name, each in tensors if name not in _SCALARS})


def fold(model: open_clip.CLIP) -> open_clip.CLIP:
    """A plain network with the deltas added to its weights; a network without any is copied."""
    plain = copy.deepcopy(model)
    for name, layer in list(_lora_layers(plain)):
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    for name, attention in [each for each in plain.named_modules() if isinstance(each[1], SelfAttention)]:
        plain.set_submodule(name, attention.whole())
    plain.__dict__.pop("peft_config", None)
    return plain.requires_grad_(True)


def _is_plain_attention(model: nn.Module, name: str, module: nn.Module | None) -> bool:
    """Whether a module is the attention of one of open_clip's blocks, in the form that `SelfAttention` computes."""
    if not isinstance(module, nn.MultiheadAttention) or module.dropout or module.add_zero_attn:
        return False
    block = model.get_submodule(name.rpartition(".")[0])
    alone = isinstance(block, ResidualAttentionBlock) and not hasattr(block, "ln_1_kv")
    return alone and module.in_proj_weight is not None and module.bias_k is None and module.bias_v is None


def _split(model: nn.Module, attentions: Sequence[str]) -> None:
    for name in attentions:
        attention = model.get_submodule(name)
        assert isinstance(attention, nn.MultiheadAttention)
        model.set_submodule(name, SelfAttention(attention).train(attention.training))


def _splits(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, SelfAttention)}


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return layer


def _room(layer: nn.Module | None) -> int:
    """The largest rank of a delta of a layer; 0 where there can be none. peft's convolutions know no dilation."""
    if isinstance(layer, nn.Conv2d):
        plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
        return min(layer.weight[0].numel(), layer.out_channels) if plain else 0
    if not isinstance(layer, nn.Linear) or isinstance(layer, NonDynamicallyQuantizableLinear):  # of an attention
        return 0
    return min(layer.in_features, layer.out_features)


def _config(lora: Lora, names: Sequence[str], base: str | None) -> LoraConfig:
    # As a pattern of whole names: of a list, peft takes every module whose name ends so.
    pattern = "|".join(re.escape(name) for name in names)
    whole = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha  # peft takes both, and writes it down
    settings: dict[str, Any] = {"r": lora.rank, "lora_alpha": whole, "target_modules": pattern}
    return LoraConfig(base_model_name_or_path=base, **settings)
