"""Experts averaged into one model: parameters by routing weight, normalisation statistics estimated anew.

Models that were trained on from the same seed lie close enough together for the average of their parameters to be a
model as well (as in "model soups", Wortsman et al., ICML 2022). It costs one model's inference instead of all. What
BatchNorm layers remember of their input is not a parameter: it belongs to the activations of the model that it was
measured in, and has to be measured again in the average.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mode.ensemble.combine import weighted_sum
from mode.errors import ModeError

if TYPE_CHECKING:
    from mode.clip.model import Clip

#: Images in a batch that statistics are estimated on, at least, if there are as many.
SMALLEST_BATCH = 32


def merge_models(clips: Mapping[str, Clip], weights: Mapping[str, float], batches: Iterable[Tensor]) -> Clip:
    """One model whose parameters are the weighted mean of several models'.

    Args:
        clips: name -> model; all of one architecture, on one device.
        weights: name -> weight, of sum 1.
        batches: normalised images float32 [n, 3, size, size] that the statistics of BatchNorm layers are estimated on;
            not read if the models have none.

    Returns:
        A new model in evaluation mode, with the first one's tokenizer and preprocessing; its card is empty.

    Raises:
        ModeError: the models' parameters differ in name or shape, or there is no batch where statistics need one.
    """
    states = {name: clip.model.state_dict() for name, clip in clips.items()}
    first = next(iter(clips))
    shapes = {name: {key: tensor.shape for key, tensor in state.items()} for name, state in states.items()}
    if different := [name for name in clips if shapes[name] != shapes[first]]:
        raise ModeError(f"{different[0]} has other parameters than {first}", "only models of one seed can be merged")
    with torch.no_grad():
        merged = {
            key: weighted_sum((weights[name], states[name][key].float()) for name in clips).to(tensor.dtype)
            if tensor.is_floating_point()
            else tensor
            for key, tensor in states[first].items()
        }
    model = copy.deepcopy(clips[first].model)
    model.load_state_dict(merged)
    if statistics_layers(model):
        estimate_statistics(model, batches)
    return replace(clips[first], model=model.eval(), card={})


def estimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the mean and variance of BatchNorm layers in the image tower to those of `batches`, each batch alike.

    All layers see the present batch's statistics while they are estimated, as in training; so a batch should have some
    dozens of images. Raises `ModeError` if all have fewer than two.
    """
    layers = statistics_layers(model)
    before = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
        layer.train()
    images = 0
    with torch.no_grad():
        for batch in batches:
            images += len(batch)
            if images > 1:  # one alone has no variance
                model.encode_image(batch.to(next(model.parameters()).dtype))  # type: ignore[operator]
    for layer, momentum in zip(layers, before, strict=True):
        layer.momentum = momentum
        layer.eval()
    if images < 2:
        raise ModeError(
            "the merged model's normalisation statistics need images, and none were kept with the ensemble",
            "give some hundred unlabelled ones: adapt(..., merge='weights', images=[...])",
        )


def statistics_layers(model: nn.Module) -> list[_BatchNorm]:
    """BatchNorm layers that remember statistics."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


def images_to_keep(experts: int, size: int) -> int:
    """How many images of each expert are kept with an ensemble: as many as 16 MiB hold, at most 512."""
    return max(1, min(512, 16 * 2**20 // (experts * 3 * size**2)))


def even_batches(images: Tensor, size: int) -> Sequence[Tensor]:
    """Batches in order, of nearly the same size and at most `size` (or 32): one image alone would have no variance."""
    return torch.tensor_split(images, -(-len(images) // max(size, SMALLEST_BATCH))) if len(images) else ()


def draw_images(kept: Mapping[str, NDArray[np.uint8]], weights: Mapping[str, float]) -> Tensor:
    """Training images in the proportion of the experts' routing weights, mixed evenly over the rows.

    Args:
        kept: expert -> uint8 [k, 3, size, size] in random order.
        weights: expert -> weight, of sum 1.

    Returns:
        uint8 [n, 3, size, size]: as many as the most of one expert, less what rounding leaves out.
    """
    most = max((len(images) for images in kept.values()), default=0)
    parts, places = [], []
    for expert, images in kept.items():
        count = min(round(weights.get(expert, 0.0) * most), len(images))
        parts.append(images[:count])
        places.append((np.arange(count) + 0.5) / max(count, 1))
    if not any(len(part) for part in parts):
        return torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    order = np.argsort(np.concatenate(places), kind="stable")
    return torch.from_numpy(np.concatenate(parts)[order])
