"""A model as an adapter: a folder of some megabytes beside the model that it is a low-rank change of, its base.

The folder holds peft's own files, `adapter_config.json` and `adapter_model.safetensors` (deltas and logit scale), and
`card.json`. Its base is a model folder beside it, `../seed`, whose weights it names by their SHA-256.

What comes from somebody else is data alone here as well: of peft's configuration nothing is used but rank, alpha and
the base's name, and a key that is set to anything but what a plain LoRA has is refused, whatever it would do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mode.checksums import check_manifest
from mode.clip.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mode.clip.lora import Lora, add_deltas, own_tensors
from mode.clip.trust import check_folder, read_json
from mode.errors import ModeError, in_one_line

#: Before every name in peft's file: its wrapper around the model.
_PREFIX = "base_model.model."
#: The only key of the file's metadata, for several would be written in any order.
_BASE = "base_sha256"
_BESIDE = re.compile(r"\.\./([a-z0-9][a-z0-9._-]*)")
#: Keys that say what this adapter is, or nothing that matters here.
_OWN = {"r", "lora_alpha", "base_model_name_or_path", "target_modules", "peft_version", "inference_mode"}
_ADVICE = "adapters here are peft's plain LoRA, as a training writes it"


@dataclass(frozen=True)
class Adapter:
    """What a model is an adapter of.

    Attributes:
        lora: which layers are adapted.
        base: name of the folder, beside the adapter's, of the model that it changes.
        base_weights: SHA-256 of that model's weights.
    """

    lora: Lora
    base: str
    base_weights: str


def write_adapter(folder: Path, model: open_clip.CLIP, adapter: Adapter) -> None:
    """Write peft's two files into `folder`; the base has to lie beside it by then."""
    adapter.lora.config(f"../{adapter.base}").save_pretrained(str(folder))
    tensors = {f"{_PREFIX}{name}": each.detach().cpu().contiguous() for name, each in own_tensors(model).items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, {_BASE: adapter.base_weights})


def read_adapter(folder: Path) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter's description and its tensors by name; `fill` compares these with the network.

    Raises:
        ModeError: a file is missing or damaged, names code or another model than one beside the folder, or is not
            that of a plain LoRA.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModeError(f"{folder}: not an adapter: it has no {ADAPTER_WEIGHTS}", "train it first, or check the path")
    check_manifest(folder, (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    check_folder(folder)
    where = folder / ADAPTER_CONFIG
    rank, alpha, base = _checked(read_json(where), str(where))
    path = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModeError(f"{path}: cannot be read: {in_one_line(error)}", "train it again") from None
    digest = metadata.get(_BASE, "")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ModeError(f"{path}: does not say which weights it is an adapter of", _ADVICE)
    own = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    layers = tuple(sorted({_layer(name) for name in own if ".lora_A." in name}))
    if not layers:
        raise ModeError(f"{path}: adapts no layer", _ADVICE)
    return Adapter(Lora(rank, alpha, layers), base, digest), own


def fill(folder: Path, model: open_clip.CLIP, adapter: Adapter, tensors: Mapping[str, Tensor]) -> open_clip.CLIP:
    """Put an adapter into the plain network of its base, which is changed in place; `folder` names it in messages.

    Raises:
        ModeError: its tensors are not those of such an adapter of such a network, by name or shape.
    """
    try:
        add_deltas(model, adapter.lora)
    except ModeError as error:
        raise ModeError(f"{folder}: does not fit {adapter.base}: {error}", "train it again") from None
    fill_deltas(folder, model, adapter, tensors)
    return model


def fill_deltas(folder: Path, model: open_clip.CLIP, adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Give a network that has such deltas the adapter's own; each keeps the network's precision. Else as `fill`."""
    expected = own_tensors(model)
    if other := sorted(expected.keys() ^ tensors.keys()):
        what = "lacks" if other[0] in expected else "has"
        raise ModeError(f"{folder / ADAPTER_WEIGHTS}: {what} '{other[0][:100]}'", "train it again")
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape or tensor.is_floating_point() != tensors[name].is_floating_point():
            shapes = f"{list(tensors[name].shape)}, but in {adapter.base} it is {list(tensor.shape)}"
            raise ModeError(f"{folder / ADAPTER_WEIGHTS}: {name} is {shapes}", "train it again")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])


def _layer(name: str) -> str:
    """The adapted layer that a tensor of peft's file belongs to; an attention is one layer, with two deltas."""
    return name.partition(".lora_A.")[0].removesuffix(".base_layer.out_proj")


def _checked(content: object, where: str) -> tuple[int, float, str]:
    """Rank, alpha and the base's name."""
    found: dict[str, Any] = content if isinstance(content, dict) else {}
    rank, alpha, base = (found.get(key) for key in ("r", "lora_alpha", "base_model_name_or_path"))
    if found.get("peft_type") != "LORA" or type(rank) is not int or rank < 1:
        raise ModeError(f"{where}: not the configuration of a LoRA with a rank of at least 1", _ADVICE)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 2**16:
        raise ModeError(f"{where}: lora_alpha: {str(alpha)[:60]} is not possible", _ADVICE)
    beside = _BESIDE.fullmatch(base) if isinstance(base, str) else None
    if beside is None:
        text = str(base)[:60]
        raise ModeError(
            f"{where}: base_model_name_or_path: '{text}' is no model beside this one, such as ../seed", _ADVICE
        )
    plain: dict[str, Any] = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    for key, value in found.items():
        if key not in _OWN and value and json.dumps(value) != json.dumps(plain.get(key), default=str):
            raise ModeError(f"{where}: {key[:60]}: {str(value)[:60]}: not known to be harmless", _ADVICE)
    return rank, float(alpha), beside[1]
