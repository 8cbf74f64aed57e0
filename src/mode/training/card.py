"""What a trained model says about itself, and what it cost."""

from __future__ import annotations

import copy
import math
import platform
from importlib.metadata import version
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mode.clip.device import without_numbers
from mode.clip.model import Clip
from mode.training.checkpoint import RunState
from mode.training.distribution import Group
from mode.training.plan import Training

#: Share of chance's loss above which a model has learnt next to nothing.
_NEXT_TO_CHANCE = 0.95


def make_card(training: Training, clip: Clip, state: RunState, group: Group) -> dict[str, Any]:
    """What the model was trained on and what that cost: by itself (`own`), and with its parent (`total`).

    Costs are `samples_seen`, `flops`, and `seconds`: the time of the training, once for each of its processes. `clip`
    still has the card of its parent, if it has one. Of an adapter, `parameters` are those of the base and its own, and
    `adapter` names that base: the parent is another model where it was itself an adapter, and was trained on.
    """
    plan, parent = training.plan, clip.card
    flops = plan.samples * flops_per_pair(clip)
    loss = sum(state.recent) / len(state.recent)
    own = {"samples_seen": plan.samples, "flops": flops, "seconds": round(state.seconds, 3)}
    card = {
        "name": plan.name,
        "role": plan.role.name,
        "source": plan.source,
        "cluster": plan.cluster,
        "parent": parent.get("name") if plan.parent is not None else None,
        "parent_weights": training.parent_weights,
        "pairs": len(plan.pairs),
        "steps": [plan.first_step, plan.last_step],
        "own": own,
        "total": {key: value + parent.get("total", {}).get(key, 0) for key, value in own.items()},
        "loss": loss,
        "doubt": learnt_nothing(plan.name, loss, chance(plan.batch_size, clip.model.logit_bias is not None)),
        "parameters": sum(parameter.numel() for parameter in clip.model.parameters()),
        "bad_images": state.bad_images,
        "provenance": {
            "configuration": training.fingerprint,
            "batch_size": plan.batch_size,
            "precision": training.recipe.precision,
            "processes": group.world,
            "device": torch.cuda.get_device_name(group.device) if group.device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "open_clip_torch", "mode-clip")},
        },
    }
    if clip.adapter is not None:
        lora = clip.adapter.lora
        learnt = sum(parameter.numel() for parameter in clip.model.parameters() if parameter.requires_grad)
        card["adapter"] = {
            "base": clip.adapter.base,
            "rank": lora.rank,
            "alpha": lora.alpha,
            "layers": len(lora.layers),
            "parameters": learnt,
        }
    return card


def chance(batch_size: int, sigmoid: bool = False) -> float:
    """The loss of a model that knows nothing but how many pairs a batch has, in nats an image.

    To CLIP's loss, each of so many captions is as likely as any other. SigLIP's (`sigmoid`) asks of each of them by
    itself whether it belongs to the image, which one in so many does.

    Example:
        >>> round(chance(2), 3), round(chance(2, sigmoid=True), 3)
        (0.693, 1.386)
    """
    if batch_size < 2 or not sigmoid:
        return math.log(batch_size)
    return math.log(batch_size) + (batch_size - 1) * math.log(batch_size / (batch_size - 1))


def learnt_nothing(name: str, loss: float, chance: float) -> str | None:
    """A sentence, if a model's loss is no better than chance after its training; else None.

    A model that has learnt so little has seen too few samples, or captions that do not belong to its images.
    """
    if chance <= 0 or loss < _NEXT_TO_CHANCE * chance:
        return None
    doubt = "too short a training, or captions that do not belong to their images"
    return f"{name} has learnt next to nothing: its loss is {loss:.2f}, chance is {chance:.2f}: {doubt}."


def flops_per_pair(clip: Clip) -> int:
    """Floating-point operations of one pair, forward and backward.

    Counted by `torch.utils.flop_counter` on the convolutions, matrix products and attention of both towers (a
    multiply-add is 2 operations), with texts of full length, on the `meta` device: nothing is computed, unless a tower
    of transformers looks at numbers on its way. The contrastive loss itself (two products of the features) is left out:
    it is below 1% of any real model.
    """
    try:
        return _flops_per_pair(clip, "meta")
    except RuntimeError:
        return _flops_per_pair(clip, "cpu")


def _flops_per_pair(clip: Clip, device: str) -> int:
    pairs = 2  # batch norm wants more than one
    model = (without_numbers(clip.model) if device == "meta" else copy.deepcopy(clip.model).to(device)).train()
    size = clip.preprocess_cfg["size"]
    dtype = next(parameter.dtype for parameter in model.visual.parameters() if parameter.ndim > 1)
    images = torch.zeros(pairs, 3, size, size, dtype=dtype, device=device)
    tokens = clip.tokenizer([""] * pairs).to(device)
    with FlopCounterMode(display=False) as counter:
        features = model(images, tokens)
        (features["image_features"].sum() + features["text_features"].sum()).backward()
    return int(counter.get_total_flops()) // pairs
