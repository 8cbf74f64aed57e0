"""What a training costs in floating-point operations."""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from mode.clip.model import Clip


def flops_per_pair(clip: Clip) -> int:
    """Floating-point operations of one pair, forward and backward.

    Counted by `torch.utils.flop_counter` on the convolutions, matrix products and attention of both towers (a
    multiply-add is 2 operations), with texts of full length, on the `meta` device: nothing is computed. The contrastive
    loss itself (two products of the features) is left out: it is below 1% of any real model.
    """
    pairs = 2  # batch norm wants more than one
    model = copy.deepcopy(clip.model).to("meta").train()
    size = clip.preprocess_cfg["size"]
    dtype = next(parameter.dtype for parameter in model.visual.parameters() if parameter.ndim > 1)
    images = torch.empty(pairs, 3, size, size, dtype=dtype, device="meta")
    tokens = clip.tokenizer([""] * pairs).to("meta")
    with FlopCounterMode(display=False) as counter:
        features = model(images, tokens)
        (features["image_features"].sum() + features["text_features"].sum()).backward()
    return int(counter.get_total_flops()) // pairs
