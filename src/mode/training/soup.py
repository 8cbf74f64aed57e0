"""Experts merged into one model for all tasks, each layer with weights of its own: a learned soup.

A merge by routing weights is another model for each task. One model for all of them takes the experts alike, or learns
how much of each to take: in every layer a softmax over the experts, by the gradient of the contrastive loss on some
training pairs (the learned soup, by layer, of "Model soups", Wortsman et al., ICML 2022). A layer is a group of
`mode.training.layers`: the stem, a block or the head of a tower; the logit scale is one by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mode.clip.model import Clip, folded
from mode.clip.preprocess import Preprocess
from mode.ensemble.combine import weighted_sum
from mode.ensemble.merge import estimate_statistics, refuse_different, statistics_layers
from mode.errors import ModeError
from mode.progress import Progress
from mode.training.layers import depths
from mode.training.learner import Towers, loss_of

#: Pairs that weights are learned on: images uint8 [b, 3, S, S] and their captions, in random order.
Pairs = Iterable[tuple[Tensor, Sequence[str]]]

#: Layer -> model -> weight, of sum 1.
LayerWeights = dict[str, dict[str, float]]

#: Adam's, of the logits of weights. Of 0.02, 0.05, 0.1 and 0.3 the one of least loss on pairs that no step had seen.
LEARNING_RATE = 0.05


def learned_soup(clips: Mapping[str, Clip], pairs: Pairs, images: Iterable[Tensor]) -> Clip:
    """One whole model, each layer the mean of the models' by weights that `learn_weights` finds.

    Args:
        clips: name -> model; all of one architecture, on one device; adapters are folded into their base.
        pairs: for `learn_weights`.
        images: normalised images float32 [n, 3, S, S] that the statistics of BatchNorm layers are estimated on; not
            read if the models have none.

    Returns:
        A new model in evaluation mode, with the first one's tokenizer and preprocessing; its card is empty.

    Raises:
        ModeError: the models differ in names or shapes of their parameters, or there is no pair.
    """
    whole = {name: folded(clip) for name, clip in clips.items()}
    weights = learn_weights(whole, pairs)
    first = next(iter(whole.values()))
    model = copy.deepcopy(first.model)
    layers = layers_of(model)
    states = {name: dict(clip.model.named_parameters()) for name, clip in whole.items()}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parts = weights[layers[key]]
            parameter.copy_(weighted_sum((parts[name], states[name][key].float()) for name in whole))
    if statistics_layers(model):
        estimate_statistics(model, images)
    return replace(first, model=model.eval(), card={}, adapter=None)


def learn_weights(clips: Mapping[str, Clip], pairs: Pairs, rate: float = LEARNING_RATE) -> LayerWeights:
    """How much of each model every layer of their mean should take: each batch is one step of Adam, from equal weights.

    Args:
        clips: name -> whole model, all of one architecture, on one device; they stay as they are.
        pairs: at least one batch of two and more. The loss is over the pairs of a batch, so all should be as large as a
            training's.
        rate: Adam's, constant.

    Returns:
        The weights after the last step.

    Raises:
        ModeError: as `learned_soup`.
    """
    first = next(iter(clips.values()))
    names, device = [*clips], next(first.model.parameters()).device
    stacked = _stacked({name: clip.model for name, clip in clips.items()})
    layers = layers_of(first.model)
    rows = [*dict.fromkeys(layers.values())]
    logits = torch.zeros(len(rows), len(names), device=device, requires_grad=True)
    # Where the models are alike, what is left of the gradient is rounding, which Adam must not blow up into steps.
    optimizer = torch.optim.Adam([logits], lr=rate, eps=1e-5)
    towers = Towers(copy.deepcopy(first.model)).eval()
    for layer in statistics_layers(towers):
        layer.train()  # takes the batch's statistics, as in training: those that it remembers are not of the mean
    loss, preprocess, steps = loss_of(towers.model), Preprocess(first), 0
    with Progress("learn the soup", unit="pairs") as bar:
        for images, captions in pairs:
            if len(images) < 2:  # one alone is told apart from nothing
                continue
            weights = dict(zip(rows, logits.softmax(dim=1), strict=True))
            mean = {f"model.{key}": torch.tensordot(weights[layers[key]], each, 1) for key, each in stacked.items()}
            tokens = first.tokenizer(list(captions)).to(device)
            features = functional_call(towers, mean, (preprocess.normalise(images.to(device)), tokens))
            optimizer.zero_grad()
            torch.autograd.backward([loss(*features)])
            optimizer.step()
            bar.update(len(images))
            steps += 1
    if not steps:
        raise ModeError("there is no pair to learn a soup's weights on", "experts need pairs of their own")
    found = logits.detach().softmax(dim=1).tolist()
    return {layer: dict(zip(names, weights, strict=True)) for layer, weights in zip(rows, found, strict=True)}


def layers_of(model: nn.Module) -> dict[str, str]:
    """Parameter -> the name of its layer: `image 0` for the stem of the image tower, then its blocks, then its head;
    the same of `text`; `logit_scale` and `logit_bias` by themselves.
    """
    groups = depths(model)
    return {
        name: f"{groups[name][0]} {groups[name][1]}" if name in groups else name for name, _ in model.named_parameters()
    }


def _stacked(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every parameter of all models, float32 [models, ...]."""
    states = {name: dict(model.named_parameters()) for name, model in models.items()}
    refuse_different(states)
    first = next(iter(states.values()))
    return {key: torch.stack([state[key].detach().float() for state in states.values()]) for key in first}
