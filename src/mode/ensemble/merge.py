"""Experts averaged into one model: parameters by routing weight, normalisation statistics estimated anew.

Models that were trained on from the same seed lie close enough together for the average of their parameters to be a
model as well (as in "model soups", Wortsman et al., ICML 2022). It costs one model's inference instead of all. What
BatchNorm layers remember of their input is not a parameter: it belongs to the activations of the model that it was
measured in, and has to be measured again in the average.

Experts that are adapters of one base are averaged by their deltas: base + sum of weight x delta. `ties` (TIES-Merging,
Yadav et al., NeurIPS 2023) and `dare` (Yu et al., ICML 2024) thin the deltas out first, so that they disturb each other
less; the thinning and the vote on signs are peft's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mode.clip.model import folded
from mode.clip.preprocess import Preprocess
from mode.ensemble.combine import weighted_sum
from mode.errors import ModeError

if TYPE_CHECKING:
    from mode.clip.model import Clip

#: Ends of the names of what BatchNorm layers remember.
_STATISTICS = (".running_mean", ".running_var")

#: Images in a batch that statistics are estimated on, at least, if there are as many.
SMALLEST_BATCH = 32
#: Images in a batch that statistics are estimated on for results and exports, whatever `machine` says: the mean over
#: other batches is another mean. As `mode.load` has it on a CPU.
MERGE_BATCH = 64

#: Computes a change of one weight.
Delta = Callable[[], Tensor]
#: How experts become one model.
Merge = Literal["weights", "ties", "dare"]
#: Share of each delta that is kept, unless told otherwise: TIES as in its paper, DARE as in FusionBench.
DENSITIES = {"ties": 0.2, "dare": 0.5}


def merge_models(
    clips: Mapping[str, Clip],
    weights: Mapping[str, float],
    batches: Iterable[Tensor],
    how: Merge = "weights",
    density: float | None = None,
) -> Clip:
    """One whole model whose parameters are the weighted mean of several models'.

    Args:
        clips: name -> model; all of one architecture, on one device.
        weights: name -> weight, of sum 1.
        batches: normalised images float32 [n, 3, size, size] that the statistics of BatchNorm layers are estimated on;
            not read if the models have none, nor of one model alone, nor of adapters, which keep their base's.
        how: `weights`; or, of adapters of one base, what their deltas are combined by: see `combine_deltas`.
        density: of `combine_deltas`; default `DENSITIES`.

    Returns:
        A new model in evaluation mode, with the first one's tokenizer and preprocessing; its card is empty.

    Raises:
        ModeError: the models' parameters differ in name or shape, there is no batch where statistics need one, or
            `ties` or `dare` of models that are not adapters of one base, or of no density in 0..1.
    """
    if how != "weights":
        density = _checked_density(clips, how, density)
    states, deltas = _parts(clips)
    first = next(iter(clips))
    refuse_different(states)
    merged = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of `dare`
        for key, tensor in states[first].items():
            merged[key] = _mean({name: states[name][key] for name in clips}, weights)
            if changes := {name: deltas[name][key]() for name in clips if key in deltas[name]}:
                zero = torch.zeros_like(tensor, dtype=torch.float32)
                listed = [changes.get(name, zero) for name in clips]
                change = combine_deltas(listed, [weights[name] for name in clips], how, density)
                merged[key] = (merged[key].float() + change).to(tensor.dtype)
    model = copy.deepcopy(folded(clips[first]).model)
    model.load_state_dict(merged)
    kept = len(clips) == 1 or (any(clip.adapter for clip in clips.values()) and _statistics_agree(states.values()))
    if statistics_layers(model) and not kept:
        estimate_statistics(model, batches)
    return replace(clips[first], model=model.eval(), card={}, adapter=None)


def refuse_different(states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise `ModeError` unless the tensors of all models, given by the models' names, are alike in name and shape."""
    shapes = {name: {key: tensor.shape for key, tensor in state.items()} for name, state in states.items()}
    first = next(iter(shapes))
    if different := [name for name in shapes if shapes[name] != shapes[first]]:
        raise ModeError(f"{different[0]} has other parameters than {first}", "only models of one seed can be merged")


def merge_on_kept(
    clips: Mapping[str, Clip],
    weights: Mapping[str, float],
    kept: Mapping[str, NDArray[np.uint8]],
    routed: Mapping[str, float],
    batch_size: int,
    how: Merge = "weights",
    density: float | None = None,
) -> Clip:
    """`merge_models` with the statistics of training images that were kept with an ensemble.

    Args:
        clips, weights, how, density: as of `merge_models`.
        kept, routed: as of `draw_images`: images by expert, and the experts' weights.
        batch_size: images in a batch, see `even_batches`.
    """
    return merge_models(clips, weights, images_of_kept(clips, kept, routed, batch_size), how, density)


def images_of_kept(
    clips: Mapping[str, Clip], kept: Mapping[str, NDArray[np.uint8]], routed: Mapping[str, float], batch_size: int
) -> Iterator[Tensor]:
    """Batches that `merge_models` estimates statistics on, of training images that were kept with an ensemble.

    Args:
        clips, kept, routed, batch_size: as of `merge_on_kept`.

    Returns:
        Normalised images float32 [n, 3, size, size] on the models' device; none where the models need none.
    """
    first = next(iter(clips.values()))
    preprocess, device = Preprocess(first), next(first.model.parameters()).device
    needed = any(statistics_layers(clip.model) for clip in clips.values())
    pixels = draw_images(kept, routed) if needed else torch.empty(0)
    return (preprocess.normalise(batch.to(device)) for batch in even_batches(pixels, batch_size))


def combine_deltas(
    deltas: Sequence[Tensor], weights: Sequence[float], how: Merge = "weights", density: float | None = None
) -> Tensor:
    """Several changes of one weight as one.

    `weights` is their weighted sum. `dare` is the same of deltas of which a random share `density` is left, scaled up
    in turn. `ties` keeps the largest share `density` of each, elects the sign of every number by the weighted sum of
    what was kept, and takes the weighted mean of those that have it. With equal weights that is peft's `ties`; with
    others peft still divides by how many there are, and the change would be too large where few of them count.

    Args:
        deltas: float32, at least one, of one shape.
        weights: of sum 1.
        how: see above.
        density: in 0..1; not used by `weights`.
    """
    if how == "weights" or density is None:
        return weighted_sum(zip(weights, deltas, strict=True))
    from peft.utils.merge_utils import calculate_majority_sign_mask, dare_linear, prune

    factors = torch.tensor(weights, dtype=deltas[0].dtype, device=deltas[0].device)
    if how == "dare":
        thinned: Tensor = dare_linear(list(deltas), factors, density)
        return thinned
    kept = torch.stack([prune(delta, density, method="magnitude") for delta in deltas])
    factors = factors.reshape(-1, *[1] * deltas[0].ndim)
    counted = factors * calculate_majority_sign_mask(factors * kept)
    together: Tensor = (counted * kept).sum(dim=0) / counted.sum(dim=0).clamp(min=torch.finfo(kept.dtype).tiny)
    return together


def _checked_density(clips: Mapping[str, Clip], how: str, density: float | None) -> float:
    if how not in DENSITIES:
        raise ModeError(f"merge: '{how}' is unknown", "it may be 'weights', 'ties' or 'dare'")
    bases = {clip.adapter.base_weights if clip.adapter else name for name, clip in clips.items()}
    if len(bases) > 1 or any(clip.adapter is None for clip in clips.values()):
        raise ModeError(
            f"merge: '{how}' combines changes of one base, but these experts are not all adapters of one",
            "merge='weights', or train them with training.adapter",
        )
    density = DENSITIES[how] if density is None else density
    if not 0 < density < 1:
        raise ModeError(
            f"density: {density} is no share of numbers to keep", f"above 0, below 1, such as {DENSITIES[how]}"
        )
    return density


def _parts(clips: Mapping[str, Clip]) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Delta]]]:
    """Of each model its state without deltas, by the names of a whole model, and what computes its deltas."""
    if all(clip.adapter is None for clip in clips.values()):
        return {name: dict(clip.model.state_dict()) for name, clip in clips.items()}, {name: {} for name in clips}
    from mode.clip.lora import base_state, delta_layers, delta_of

    states = {name: base_state(clip.model) for name, clip in clips.items()}
    layers = {name: delta_layers(clip.model) for name, clip in clips.items()}
    return states, {
        name: {key: partial(delta_of, layer) for key, layer in each.items()} for name, each in layers.items()
    }


def _statistics_agree(states: Iterable[Mapping[str, Tensor]]) -> bool:
    """Whether BatchNorm layers remember the same in all models."""
    first, *others = ({key: each for key, each in state.items() if key.endswith(_STATISTICS)} for state in states)
    return all(torch.equal(tensor, other[key]) for other in others for key, tensor in first.items())


def _mean(tensors: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted mean of floating-point tensors; of one that all have in common, and of counts, the first."""
    first = next(iter(tensors.values()))
    if not first.is_floating_point() or (len(tensors) > 1 and len({each.data_ptr() for each in tensors.values()}) == 1):
        return first
    return weighted_sum((weights[name], tensor.float()) for name, tensor in tensors.items()).to(first.dtype)


def estimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the mean and variance of BatchNorm layers in the image tower to those of `batches`, each batch alike.

    All layers see the present batch's statistics while they are estimated, as in training; so a batch should have some
    dozens of images; one of a single image is left out. Raises `ModeError` if none has more.
    """
    layers = statistics_layers(model)
    before = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
        layer.train()
    seen = False
    with torch.no_grad():
        for batch in batches:
            if len(batch) > 1:  # one image alone has no variance
                seen = True
                model.encode_image(batch.to(next(model.parameters()).dtype))  # type: ignore[operator]
    for layer, momentum in zip(layers, before, strict=True):
        layer.momentum = momentum
        layer.eval()
    if not seen:
        raise ModeError(
            "the merged model's normalisation statistics need images, and none were kept with the ensemble",
            "give some hundred unlabelled ones: adapt(..., merge='weights', images=[...])",
        )


def statistics_layers(model: nn.Module) -> list[_BatchNorm]:
    """BatchNorm layers that remember statistics."""
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]


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
