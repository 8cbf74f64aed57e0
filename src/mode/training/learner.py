"""A model that learns: where it comes from, CLIP's contrastive objective over a whole batch, and one step of AdamW."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import compress
from operator import itemgetter
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from mode.clip.configuration import image_of, preprocessing_of
from mode.clip.device import autocast
from mode.clip.encode import encode_text
from mode.clip.folder import base_of, holds_adapter
from mode.clip.model import Clip, adapted, adapted_further, build_model, configuration_of, load_model
from mode.clip.pretrained import refuse_untrainable
from mode.errors import ModeError
from mode.params import ImageParams, TrainingParams
from mode.training.distribution import Group
from mode.training.layers import eval_locked, lock, rates
from mode.training.plan import Training

#: Of images and texts, the logit scale, and a SigLIP's logit bias.
Features = tuple[Tensor, ...]

#: Largest logit scale, as in the CLIP paper, section 2.5.
_LARGEST_SCALE = 100


def first_model(training: Training, group: Group) -> Clip:
    """The parent's model, or a new one with random weights, on the device of this process.

    An adapter has new deltas in the parent's network, or where the parent is one, the parent's deltas in its base's.

    Raises:
        ModeError: the parent takes other images than `training.image` describes, or is not what `training.adapter`
            says of an expert.
    """
    plan, precision = training.plan, training.recipe.precision
    if plan.parent is not None:
        _refuse_other_kind(training, plan.parent)
        whole = base_of(plan.parent) or plan.parent
        clip = load_model(whole, precision=precision)
        refuse_untrainable(clip.model_cfg, str(whole))
        lock(clip.model, training.recipe)
        _refuse_other_images(clip, training.image, whole)
    else:
        captions = (caption for block in training.index.iter_captions(65_536) for caption in block)
        refuse_untrainable(configuration_of(training.model), "model")
        clip = build_model(training.model, training.image, captions, training.random_seed, precision)
    visual = clip.model.visual
    if sum(isinstance(module, nn.Conv2d) for module in visual.modules()) > 1:  # more than a ViT's patch embedding
        visual.to(memory_format=torch.channels_last)  # faster for convolutions
    if training.adapter is not None and plan.parent is not None:
        if holds_adapter(plan.parent):
            clip = adapted_further(clip, training.adapter, plan.parent)
        else:
            weights = training.parent_weights or ""
            clip = adapted(clip, training.adapter, plan.parent.name, weights, training.random_seed)
    if group.world > 1 and group.device.type == "cuda":
        clip.model = nn.SyncBatchNorm.convert_sync_batchnorm(clip.model)  # type: ignore[no-untyped-call]
    clip.model.to(group.device)
    return clip


def _refuse_other_kind(training: Training, parent: Path) -> None:
    """What goes on from an expert is what that one is, an adapter or a whole model; any other training begins whole."""
    is_adapter = holds_adapter(parent)
    if is_adapter and training.adapter is None:
        raise ModeError(f"{parent}: an adapter, but training.adapter is null", "set training.adapter as it was")
    if not is_adapter and training.adapter is not None and training.plan.role.length == "update":
        advice = "`training.adapter: null`, as it was, or train the expert again"
        raise ModeError(f"{parent}: a whole model, but training.adapter is set", advice)


def _refuse_other_images(clip: Clip, image: ImageParams, parent: Path) -> None:
    """A model is trained on with the images that it knows, since inference takes size, mean and std from its folder."""
    its = preprocessing_of(clip.preprocess_cfg, clip.model.visual.image_size)
    image_of(ImageParams.model_validate(image.model_dump()), its, str(parent))


def adamw(model: nn.Module, recipe: TrainingParams) -> AdamW:
    """AdamW on what learns; gains, biases and the logit scale are not decayed, as in open_clip.

    Each group of parameters has, as `rate`, its multiple of the learning rate.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    for _, parameter, rate in rates(model, recipe.layer_decay):
        groups[parameter.ndim >= 2, rate].append(parameter)
    settings = [
        {"params": parameters, "weight_decay": recipe.weight_decay if decayed else 0.0, "rate": rate}
        for (decayed, rate), parameters in sorted(groups.items(), key=itemgetter(0))
    ]
    return AdamW(settings, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)


class Learner:
    """One model, its optimiser and its loss, in one of the processes that train it; all begin with the same weights.

    Attributes:
        rate: learning rate of the last step.
        grad_norm: norm of the last gradient before clipping, a scalar on the model's device; 0 if it is not clipped.
    """

    def __init__(self, training: Training, model: open_clip.CLIP, optimizer: AdamW, group: Group) -> None:
        self._training, self._group = training, group
        self.model, self.optimizer = model.train(), optimizer
        eval_locked(model)
        self.rate, self.grad_norm = 0.0, torch.zeros(())
        self._towers: nn.Module = Towers(model)
        if group.world > 1:
            self._towers = DistributedDataParallel(self._towers)
        if training.recipe.compile:
            compile_towers(self._towers)
        self._autocast = partial(autocast, group.device, training.recipe.precision)
        self._loss = loss_of(model, group.rank, group.world)

    def step(self, number: int, images: Tensor, tokens: Tensor) -> Tensor:
        """Make optimiser step `number`, counted from the beginning of the seed, on this process's share of a batch.

        Images are normalised, [b, 3, S, S], and tokens int64 [b, at most context], both on the device. So is the loss,
        a scalar: to look at it is to wait for a GPU.
        """
        recipe = self._training.recipe
        self.rate = self._training.plan.schedule.rate(number)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.rate * parameters["rate"]
        reseed = partial(self._reseed, number)
        loss = backward(self._towers, self._loss, images, tokens, recipe.accumulate, self._autocast, reseed)
        if recipe.clip_norm is not None:
            self.grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(_LARGEST_SCALE))
        return loss

    def _reseed(self, step: int, forward_pass: int) -> None:
        """Makes dropout a function of random seed, step, process and forward pass: there is no state to save."""
        words = np.random.SeedSequence([self._training.random_seed, step, self._group.rank, forward_pass])
        torch.manual_seed(int(words.generate_state(1, np.uint64)[0]))


def compile_towers(towers: nn.Module) -> None:
    """Let torch compile towers at their first step.

    Texts are cut to the longest of their batch: the second length makes torch compile one program for all that follow.
    Images have one size, which it makes use of. Of its analysis of tiling torch says that it does not apply where
    lengths vary, and 2.11 fails at it there (pytorch/pytorch#181563).
    """
    towers.compile(options={"triton.coalesce_tiling_analysis": False})


def loss_of(model: open_clip.CLIP, rank: int = 0, world: int = 1) -> ClipLoss | SigLipLoss:
    """CLIP's contrastive loss, or the sigmoid loss of a model with a logit bias, over the batches of all processes.

    It takes image features, text features, and `scalars_of` the model.
    """
    if model.logit_bias is not None:
        return SigLipLoss(rank=rank, world_size=world)
    return ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world)


def scalars_of(model: open_clip.CLIP) -> list[Tensor]:
    """The logit scale [], and a SigLIP's logit bias."""
    return [model.logit_scale.exp(), *([] if model.logit_bias is None else [model.logit_bias])]


class Towers(nn.Module):
    """Both towers in one forward pass, texts cut to the longest of the batch.

    `forward(images, tokens)` takes normalised images [b, 3, S, S] and token ids int64 [b, at most context] and returns
    image features [b, d] and text features [b, d], of unit length, float32, the logit scale [], and the bias of SigLIP.
    """

    def __init__(self, model: open_clip.CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tokens: Tensor) -> Features:
        """See the class."""
        image_features = F.normalize(self.model.encode_image(images).float(), dim=-1)
        text_features = F.normalize(encode_text(self.model, tokens).float(), dim=-1)
        return image_features, text_features, *scalars_of(self.model)


def backward(
    towers: nn.Module,
    loss: ClipLoss | SigLipLoss,
    images: Tensor,
    tokens: Tensor,
    passes: int = 1,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    reseed: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Gradients of the contrastive loss over the whole batch, accumulated into the parameters.

    With more than one pass, every pair is still contrasted with the whole batch: the features of all passes are
    computed without gradients, the loss gives the gradient of every feature, and each pass is then run again with
    gradients and continued from those (GradCache, arXiv 2101.06983). Memory is that of one pass, time about 4/3.
    Batch norm sees one pass at a time, as in open_clip.

    Args:
        towers: `Towers`, or those in `DistributedDataParallel`.
        loss: open_clip's, which gathers the features of all processes.
        images: normalised, [b, 3, S, S]: this process's share of the batch.
        tokens: int64 [b, at most context].
        passes: into how many equal parts the batch is cut.
        autocast: entered around every forward pass.
        reseed: called with the pass's number before it, so that dropout is the same both times.

    Returns:
        The loss, a scalar without gradient.
    """
    if passes == 1:
        reseed(0)
        with autocast():
            features = towers(images, tokens)
        value: Tensor = loss(*features)
        torch.autograd.backward([value])
        return value.detach()

    parts = list(zip(images.chunk(passes), tokens.chunk(passes), strict=True))
    cached: list[Features] = []
    with torch.no_grad():
        for number, part in enumerate(parts):
            reseed(number)
            with autocast():
                cached.append(towers(*part))
    image_features = torch.cat([features[0] for features in cached]).requires_grad_()
    text_features = torch.cat([features[1] for features in cached]).requires_grad_()
    scalars = [scalar.clone().requires_grad_() for scalar in cached[0][2:]]
    value = loss(image_features, text_features, *scalars)
    image_grads, text_grads, *scalar_grads = torch.autograd.grad(value, [image_features, text_features, *scalars])

    grads = zip(image_grads.chunk(passes), text_grads.chunk(passes), strict=True)
    for number, (part, (image_grad, text_grad)) in enumerate(zip(parts, grads, strict=True)):
        reseed(number)
        last = number == passes - 1
        with nullcontext() if last or not isinstance(towers, DistributedDataParallel) else towers.no_sync():
            with autocast():
                features = towers(*part)
            feature_grads = [image_grad, text_grad, *(grad / passes for grad in scalar_grads)]
            # Those of a locked tower have nowhere to go.
            learning = [feature.requires_grad for feature in features]
            torch.autograd.backward(list(compress(features, learning)), list(compress(feature_grads, learning)))
    return value.detach()
