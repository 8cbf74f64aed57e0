"""What a trained model says about itself."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from mode.clip.model import Clip
from mode.training.checkpoint import RunState
from mode.training.distribution import Group
from mode.training.flops import flops_per_pair
from mode.training.plan import Training


def make_card(training: Training, clip: Clip, state: RunState, group: Group) -> dict[str, Any]:
    """What the model was trained on and what that cost: by itself (`own`), and with its parent (`total`).

    Costs are `samples_seen`, `flops`, and `seconds`: the time of the training, once for each of its processes.

    Args:
        training: that made it.
        clip: the model, still with the card of its parent if it has one.
        state: at the end.
        group: the processes that trained it.
    """
    plan, parent = training.plan, clip.card
    own = {
        "samples_seen": plan.samples,
        "flops": plan.samples * flops_per_pair(clip),
        "seconds": round(state.seconds, 3),
    }
    return {
        "name": plan.name,
        "role": plan.role.name,
        "source": plan.source,
        "cluster": plan.cluster,
        "parent": parent.get("name") if plan.parent is not None else None,
        "pairs": len(plan.rows),
        "steps": [plan.first_step, plan.last_step],
        "own": own,
        "total": {key: value + parent.get("total", {}).get(key, 0) for key, value in own.items()},
        "loss": sum(state.recent) / len(state.recent),
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
