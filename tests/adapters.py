"""Adapters that were never trained, for tests: a base, and random deltas of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mode.clip.folder import WEIGHTS
from mode.clip.model import Clip, adapted, build_model, load_model, save_model
from mode.files import sha256_of
from mode.params import AdapterParams, ImageParams, ModelParams

CAPTIONS = ["a red dog", "a blue dog", "Two zebras, one crossing!"]


def write_base(folder: Path, model: ModelParams, random_seed: int = 0, captions: list[str] = CAPTIONS) -> Path:
    """A whole model with random weights, for images of 32 pixels."""
    save_model(folder, build_model(model, ImageParams(size=32), captions, random_seed), {"name": folder.name})
    return folder


def write_adapter(folder: Path, base: Path, random_seed: int = 1, **params: Any) -> Clip:
    """An adapter with random deltas and a logit scale of its own; also what was written."""
    clip = adapted(load_model(base), AdapterParams(rank=4, **params), base.name, sha256_of(base / WEIGHTS), random_seed)
    torch.manual_seed(random_seed)
    with torch.no_grad():
        for name, parameter in clip.model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
        clip.model.logit_scale.add_(0.1 * random_seed)
    save_model(folder, clip, {"name": folder.name})
    clip.model.eval()
    return clip
