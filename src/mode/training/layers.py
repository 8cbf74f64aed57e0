"""Layers of a CLIP from bottom to top: which of them learn, and how fast.

Each tower is a row of groups: the stem (embeddings and what comes before the blocks), every block, and the head (what
comes after them). Groups are told by the names of parameters, as BEiT's layer-wise decay does it, so that all of
open_clip's families are alike: its own towers, ResNets, those of timm and of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mode.errors import ModeError
from mode.params import TrainingParams

#: A block's number in a parameter's name: open_clip, timm (`blocks`, `stages`, `layers`), ResNets, transformers.
_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|stages|layers?)\.?(\d+)\.")
#: What stands below the first block.
_STEM = re.compile(
    r"(?:^|\.)(?:conv\d|bn\d|stem\w*|patch_embed|class_embedding|cls_token|cls_emb|pos_embed|positional_embedding|ln_pre"
    r"|norm_pre|token_embedding|embeddings?)(?:\.|$)"
)


def depths(model: nn.Module) -> dict[str, tuple[str, int, int]]:
    """Parameter -> (tower, its group from 0, groups of the tower); logit scale and bias belong to no tower.

    Args:
        model: of open_clip.

    Returns:
        `tower` is `image` or `text`; a ViT of 12 blocks has 14 groups.
    """
    names = [name for name, _ in model.named_parameters() if "." in name or not name.startswith("logit_")]
    tower = {name: "image" if name.startswith("visual.") else "text" for name in names}
    block = {name: int(found[1]) for name in names if (found := _BLOCK.search(name))}
    first = {each: min((block[name] for name in block if tower[name] == each), default=0) for each in ("image", "text")}
    last = {each: max((block[name] for name in block if tower[name] == each), default=-1) for each in ("image", "text")}

    def place(name: str) -> tuple[str, int, int]:
        each = tower[name]
        head = last[each] - first[each] + 2
        outside = 0 if _STEM.search(name) and "pool" not in name else head  # pooling has embeddings of its own
        return each, 1 + block[name] - first[each] if name in block else outside, head + 1

    return {name: place(name) for name in names}


def lock(model: nn.Module, recipe: TrainingParams) -> None:
    """Lock the groups of each tower that `recipe` does not leave unlocked: their parameters take no gradient.

    Statistics of batch norm there stay as they are, which `eval_locked` sees to.

    Raises:
        ModeError: more groups are to stay unlocked than there are.
    """
    unlocked = {"image": recipe.unlocked_image_groups, "text": recipe.unlocked_text_groups}
    parameters, groups = dict(model.named_parameters()), depths(model)
    for tower, count in unlocked.items():
        if count is None:
            continue
        total = next(groups for each, _, groups in groups.values() if each == tower)
        if count > total:
            message = f"training.unlocked_{tower}_groups: {count}, but the {tower} tower has {total}"
            raise ModeError(message, "stem, blocks and head are one each; null locks nothing")
        for name, (each, depth, _) in groups.items():
            if each == tower and depth < total - count:
                parameters[name].requires_grad_(False)


def eval_locked(model: nn.Module) -> None:
    """Put batch norms whose gain is locked into evaluation mode, after `model.train()`."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.requires_grad:
            module.eval()


def rates(model: nn.Module, layer_decay: float) -> Iterator[tuple[str, nn.Parameter, float]]:
    """Every parameter that learns, with its name and the multiple of the learning rate that it gets.

    That is `layer_decay` to the power of the groups between it and its tower's head.
    """
    groups = depths(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _, depth, total = groups.get(name, ("", 0, 1))
            yield name, parameter, layer_decay ** (total - 1 - depth)
