"""The contrastive objective of CLIP over a whole batch, however many processes and forward passes share it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import open_clip
import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mode.clip.encode import encode_text

Features = tuple[Tensor, Tensor, Tensor]


class Towers(nn.Module):
    """Both towers in one forward pass, texts cut to the longest of the batch.

    Args:
        model: open_clip's.

    `forward(images, tokens)` takes normalised images [b, 3, S, S] and token ids int64 [b, at most context] and returns
    image features [b, d] and text features [b, d], of unit length, float32, and the logit scale [].
    """

    def __init__(self, model: open_clip.CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tokens: Tensor) -> Features:
        """See the class."""
        image_features = self.model.encode_image(images)
        text_features = encode_text(self.model, tokens)
        return (
            F.normalize(image_features.float(), dim=-1),
            F.normalize(text_features.float(), dim=-1),
            self.model.logit_scale.exp(),
        )


def backward(
    towers: nn.Module,
    loss: ClipLoss,
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
    scale = cached[0][2].clone().requires_grad_()
    value = loss(image_features, text_features, scale)
    image_grads, text_grads, scale_grad = torch.autograd.grad(value, [image_features, text_features, scale])

    grads = zip(image_grads.chunk(passes), text_grads.chunk(passes), strict=True)
    for number, (part, (image_grad, text_grad)) in enumerate(zip(parts, grads, strict=True)):
        reseed(number)
        last = number == passes - 1
        with nullcontext() if last or not isinstance(towers, DistributedDataParallel) else towers.no_sync():
            with autocast():
                features = towers(*part)
            torch.autograd.backward(features, [image_grad, text_grad, scale_grad / passes])
    return value.detach()
