"""Several CLIPs as one model with open_clip's interface."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mode.clip.device import Precision, autocast
from mode.clip.encode import encode_prompts
from mode.clip.model import Clip
from mode.clip.preprocess import SharedPreprocess
from mode.ensemble.images import Images, rgb_batches
from mode.errors import ModeError


class JointEncoder(nn.Module):
    """Several CLIPs as one model with open_clip's interface.

    The features of an image are those of all models one after the other, each of length 1 and then scaled by the root
    of the model's weight::

        encode_image(x) = [sqrt(w_1) f_1(x) / |f_1(x)|, sqrt(w_2) f_2(x) / |f_2(x)|, ...],     sum of w = 1

    and those of a text likewise. So they have length 1, and the inner product of an image and a text is the weighted
    sum of the models' cosine similarities: the ensemble's own score. Zero-shot classification by any tool is therefore
    that of the ensemble, exactly if a class has one prompt. With several, tools average a class's features and
    normalise the average as a whole, where the ensemble does so for each model by itself: a model whose prompts of a
    class agree less then counts for a little less.

    Args:
        clips: name -> model; all on one device.
        weights: name -> weight, of sum 1. The attributes `clips` and `per_model` leave out a model of weight 0.
        precision: as in `mode.load`.
        batch_size: images or texts in one forward pass of the methods that take more.
    """

    def __init__(
        self, clips: Mapping[str, Clip], weights: Mapping[str, float], precision: Precision, batch_size: int
    ) -> None:
        super().__init__()
        self.clips = {name: clips[name] for name, weight in weights.items() if weight > 0}
        self.per_model = {name: weights[name] for name in self.clips}
        self._networks = nn.ModuleList(clip.model for clip in self.clips.values())
        self.precision, self.batch_size = precision, batch_size
        self._preprocess = SharedPreprocess(self.clips)
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the models are; `.to(device)` moves them (a task shares them with its ensemble)."""
        return next(self._networks.parameters()).device

    @property
    def logit_scale(self) -> Tensor:
        """As open_clip's, float32 scalar: log of the models' weighted mean factor from cosines to logits."""
        factors = [weight * self.clips[name].model.logit_scale.exp().float() for name, weight in self.per_model.items()]
        return torch.stack(factors).sum().log().detach()

    @property
    def preprocess(self) -> Any:
        """PIL image -> float32 [3, size, size], what `encode_image` takes a batch of (open_clip's transform)."""
        self._common()
        return self._preprocess.first.transform

    @property
    def tokenizer(self) -> Any:
        """Texts -> int64 [texts, context], what `encode_text` takes."""
        return self._common().tokenizer

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:  # noqa: ARG002
        """Features of images, float32 [n, sum of the models' dimensions], see the class.

        Args:
            image: float [n, 3, size, size], of `preprocess`.
            normalize: no matter: the features have length 1 anyway.

        Raises:
            ModeError: the models take images of different sizes or normalisation.
        """
        self._common()
        return self._joined(self._encode_pixels(clip, image) for clip in self.clips.values())

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:  # noqa: ARG002
        """Features of texts, as those of images; `text`: int64 [n, context], of `tokenizer`.

        Raises:
            ModeError: the models have different text towers.
        """
        self._common()
        with autocast(self.device, self.precision):
            encoded = [clip.model.encode_text(text.to(self.device)) for clip in self.clips.values()]
        return self._joined(F.normalize(vectors.float(), dim=-1) for vectors in encoded)

    def _joined(self, vectors: Iterable[Tensor]) -> Tensor:
        """Unit vectors of each model to the features of the class."""
        roots = [weight**0.5 for weight in self.per_model.values()]
        return torch.cat([root * each for root, each in zip(roots, vectors, strict=True)], dim=-1)

    def _encode_pixels(self, clip: Clip, batch: Tensor) -> Tensor:
        """Normalised pixels to unit vectors float32 [n, d]."""
        batch = batch.to(self.device, torch.bfloat16 if self.precision == "bf16" else torch.float32)
        with autocast(self.device, self.precision):
            vectors: Tensor = clip.model.encode_image(batch)
        return F.normalize(vectors.float(), dim=-1)

    def _encode_images(self, images: Images) -> dict[str, Tensor]:
        """Model -> unit vectors float32 [n, d] of whatever `images` may be; each is decoded once."""
        parts = {name: [torch.empty(0, clip.dimensions, device=self.device)] for name, clip in self.clips.items()}
        with torch.inference_mode():
            for batch in self._inputs(images):
                for name, clip in self.clips.items():
                    parts[name].append(self._encode_pixels(clip, batch[name]))
        return {name: torch.cat(vectors) for name, vectors in parts.items()}

    def _inputs(self, images: Images) -> Iterator[dict[str, Tensor]]:
        """Batches of model -> normalised pixels."""
        if isinstance(images, Tensor) and images.is_floating_point():
            self._common()
            for batch in torch.split(images[None] if images.ndim == 3 else images, self.batch_size):
                yield dict.fromkeys(self.clips, batch)
        else:
            for pictures in rgb_batches(images, self.batch_size):
                yield self._preprocess.inputs(self._preprocess.pixels(pictures), self.device)

    def _encode_prompts(self, prompts: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Model -> unit vectors float32 [classes, d]."""
        with autocast(self.device, self.precision):
            return {
                name: encode_prompts(clip, prompts, batch_size=self.batch_size, device=self.device, name=name)
                for name, clip in self.clips.items()
            }

    def _common(self) -> Clip:
        """Any of the models, after a check that all take the same input."""
        first = next(iter(self.clips.values()))
        if not self._preprocess.alike:
            raise ModeError("the experts take images of different sizes or normalisation", "give images, not a tensor")
        if any(clip.model_cfg["text_cfg"] != first.model_cfg["text_cfg"] for clip in self.clips.values()):
            raise ModeError("the experts have different text towers", "use adapt() and retrieve(), which take texts")
        return first
