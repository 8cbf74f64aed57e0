"""The ensemble as one zero-shot classifier: encoded images and class names in, probabilities out."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mode.data.images import UndecodableImage, decode
from mode.embedding.store import pick_device
from mode.ensemble.mixture import Mixture, combine
from mode.errors import ModeError
from mode.evaluation.features import Preprocess, encode_prompts
from mode.training.model import Clip, load_model

#: What a class name is put into where no templates are given; `{c}` is its place.
TEMPLATES = ("{c}",)


@dataclass(frozen=True)
class Answer:
    """What the ensemble says of some images.

    Attributes:
        classes: L names.
        probabilities: float32 [images, L], rows of sum 1.
        weights: routing weight of each expert, from the classes alone.
    """

    classes: tuple[str, ...]
    probabilities: Tensor
    weights: dict[str, float]

    @property
    def labels(self) -> list[str]:
        """The most probable class of each image."""
        return [self.classes[column] for column in self.probabilities.argmax(dim=1).tolist()]


class Classifier:
    """Experts and their mixture, in memory.

    Args:
        mixture: routes.
        models: expert -> its model; an expert that has none is stood in for by `seed`.
        device: `auto`, `cpu`, `cuda` ...
        batch_size: images or texts in one forward pass.
    """

    def __init__(
        self, mixture: Mixture, models: Mapping[str, Clip], device: str = "auto", batch_size: int = 64
    ) -> None:
        self.mixture, self.batch_size = mixture, batch_size
        self.device = str(pick_device(device))
        self.members = mixture.members(models)
        self.models = {name: models[name] for name in dict.fromkeys(self.members.values())}
        for clip in self.models.values():
            clip.model.to(self.device).eval()

    @classmethod
    def load(cls, mixture: Path, models: Mapping[str, Path], device: str = "auto") -> Classifier:
        """From the folder of a saved mixture and model folders. Raises `ModeError` if one cannot be read."""
        return cls(Mixture.load(mixture), {name: load_model(folder) for name, folder in models.items()}, device)

    def classify(self, images: Sequence[bytes], classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Answer:
        """Classify encoded images (JPEG, PNG, WebP ...) among `classes`.

        The probabilities are the softmax of the ensemble's cosine similarities, which is a routing-weighted sum of the
        experts', times the routing-weighted mean of the experts' logit scales. The scale changes no answer, only how
        sure it sounds.

        Raises:
            ModeError: no classes, a template without `{c}`, or an image that cannot be decoded (named by its number).
        """
        if not classes or not all(name.strip() for name in classes):
            raise ModeError("classes: needs at least one name, and none of them empty")
        templates = templates or TEMPLATES
        if bad := next((text for text in templates if "{c}" not in text), None):
            raise ModeError(f"templates: '{bad}' has no {{c}}", "it goes where the class name goes")
        prompts = [[template.replace("{c}", name) for template in templates] for name in classes]
        routed = self.mixture.weights(prompts)
        weights: dict[str, float] = {}  # by model: several experts may have the same stand-in
        for expert, weight in routed.items():
            weights[self.members[expert]] = weights.get(self.members[expert], 0.0) + weight
        similarities = {}
        for name, clip in self.models.items():
            columns = encode_prompts(clip, prompts, batch_size=self.batch_size, device=self.device, name=name)
            similarities[name] = (self._encode(clip, images) @ columns.T).cpu().numpy()
        scale = sum(weight * self.models[name].model.logit_scale.exp().item() for name, weight in weights.items())
        scores = torch.from_numpy(combine(similarities, weights)).float()
        return Answer(tuple(classes), F.softmax(scale * scores, dim=1), routed)

    def _encode(self, clip: Clip, images: Sequence[bytes]) -> Tensor:
        """Unit vectors float32 [images, d]."""
        preprocess = Preprocess(clip)
        vectors = [torch.empty(0, clip.model_cfg["embed_dim"], device=self.device)]
        for start in range(0, len(images), self.batch_size):
            pixels = []
            for number, content in enumerate(images[start : start + self.batch_size], start):
                try:
                    pixels.append(preprocess.pixels(decode(content).convert("RGB")))
                except UndecodableImage as error:
                    raise ModeError(f"image {number}: cannot be decoded: {error}") from None
            with torch.inference_mode():
                batch = preprocess.normalise(torch.stack(pixels).to(self.device))
                vectors.append(F.normalize(clip.model.encode_image(batch).float(), dim=-1))
        return torch.cat(vectors)


def from_base64(text: str, number: int) -> bytes:
    """The bytes of an image given as base64, with or without a `data:` prefix; `number` names it in errors.

    Raises:
        ModeError: not base64.
    """
    try:
        return base64.b64decode(text.rpartition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise ModeError(f"image {number}: not base64") from None
