"""A model that learns: where it comes from, AdamW, and one optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from mode.clip.device import autocast
from mode.clip.model import Clip, build_model, load_model
from mode.errors import ModeError
from mode.params import ImageParams, TrainingParams
from mode.training.distribution import Group
from mode.training.objective import Towers, backward
from mode.training.plan import Training

#: Largest logit scale, as in the CLIP paper, section 2.5.
_LARGEST_SCALE = 100


def first_model(training: Training, group: Group) -> Clip:
    """The parent's model, or a new one with random weights, on the device of this process.

    Raises:
        ModeError: the parent takes other images than `training.image` describes.
    """
    plan, precision = training.plan, training.recipe.precision
    if plan.parent is not None:
        clip = load_model(plan.parent, precision=precision)
        _refuse_other_images(clip, training.image, plan.parent)
    else:
        captions = (caption for block in training.index.iter_captions(65_536) for caption in block)
        clip = build_model(training.model, training.image, captions, training.random_seed, precision)
    clip.model = _placed(clip.model, group)
    return clip


def adamw(model: nn.Module, recipe: TrainingParams) -> AdamW:
    """AdamW; gains, biases and the logit scale are not decayed, as in open_clip."""
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    return AdamW(
        [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": recipe.weight_decay}],
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.eps,
        fused=True,
    )


class Learner:
    """One model, its optimiser and its loss, in one of the processes that train it.

    Args:
        training: the recipe and the schedule.
        model, optimizer: with the weights and moments to begin with; all processes have the same.
        group: the processes.

    Attributes:
        rate: learning rate of the last step.
        grad_norm: norm of the last gradient before clipping, a scalar on the model's device; 0 if it is not clipped.
    """

    def __init__(self, training: Training, model: open_clip.CLIP, optimizer: AdamW, group: Group) -> None:
        self._training, self._group = training, group
        self.model, self.optimizer = model.train(), optimizer
        self.rate, self.grad_norm = 0.0, torch.zeros(())
        towers: nn.Module = Towers(model)
        if group.world > 1:
            towers = DistributedDataParallel(towers)
        if training.recipe.compile:
            # Texts are cut to the longest of a batch: one program for all lengths instead of one for each.
            towers.compile(dynamic=True)
        self._towers = towers
        self._autocast = partial(autocast, group.device, training.recipe.precision)
        self._loss = ClipLoss(
            local_loss=True, gather_with_grad=True, cache_labels=True, rank=group.rank, world_size=group.world
        )

    def step(self, number: int, images: Tensor, tokens: Tensor) -> Tensor:
        """Make optimiser step `number` on a batch.

        Args:
            number: counted from the beginning of the seed.
            images: this process's share, normalised, [b, 3, S, S], on the device.
            tokens: int64 [b, at most context], on the device.

        Returns:
            The loss, a scalar on the device: to look at it is to wait for a GPU.
        """
        recipe = self._training.recipe
        self.rate = self._training.plan.schedule.rate(number)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.rate
        loss = backward(
            self._towers, self._loss, images, tokens, recipe.accumulate, self._autocast, self._reseeding(number)
        )
        if recipe.clip_norm is not None:
            self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(_LARGEST_SCALE))
        return loss

    @property
    def logit_scale(self) -> float:
        """What cosine similarities are multiplied by."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters())

    def _reseeding(self, step: int) -> Callable[[int], None]:
        """Makes dropout a function of random seed, step, process and forward pass: there is no state to save."""

        def reseed(number: int) -> None:
            words = np.random.SeedSequence([self._training.random_seed, step, self._group.rank, number])
            torch.manual_seed(int(words.generate_state(1, np.uint64)[0]))

        return reseed


def _placed(model: open_clip.CLIP, group: Group) -> open_clip.CLIP:
    """The model on its device, convolutions in the memory layout that is fastest for them."""
    visual = model.visual
    if sum(isinstance(module, nn.Conv2d) for module in visual.modules()) > 1:  # more than a ViT's patch embedding
        visual.to(memory_format=torch.channels_last)
    if group.world > 1 and group.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return model.to(group.device)


def _refuse_other_images(clip: Clip, image: ImageParams, parent: Path) -> None:
    """A model is trained on with the images that it knows, since inference takes size, mean and std from its folder."""
    its = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, **clip.preprocess_cfg}
    size = its.get("size", clip.model.visual.image_size)
    found = {"size": size if isinstance(size, int) else size[0], "mean": list(its["mean"]), "std": list(its["std"])}
    for name, ours in {"size": image.size, "mean": list(image.mean), "std": list(image.std)}.items():
        if ours != found[name]:
            raise ModeError(
                f"image.{name} is {ours}, but {parent} was made for {found[name]}",
                f"set image.{name} to its value, or train it again",
            )
