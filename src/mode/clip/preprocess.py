"""Images to what a model takes at inference, in two steps: pixels, which models can share, and their normalisation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor

from mode.clip.configuration import preprocessing_of
from mode.clip.model import Clip
from mode.data.images import normalise


class Preprocess:
    """A model's inference transform.

    `normalise(pixels(image))` is bit by bit what `transform(image)` gives on an RGB image.

    Attributes:
        transform: the two steps in one, as `open_clip.create_model_and_transforms(...)[2]`: a PIL image to float32
            [3, size, size].
        geometry: a key that is equal for models whose pixels are the same.
        key: a key that is equal for models whose normalised input is the same.
    """

    def __init__(self, clip: Clip) -> None:
        config = preprocessing_of(clip.preprocess_cfg, clip.model.visual.image_size)
        shape = [config.size, config.mode, config.interpolation, config.resize_mode, config.fill_color]
        self.geometry = json.dumps(shape)
        self.key = json.dumps([self.geometry, config.mean, config.std])
        self.transform = image_transform_v2(PreprocessCfg(**asdict(config)), is_train=False)
        # open_clip's last two steps turn pixels into floats and normalise them; the ones before work on the image.
        self._resize_and_crop = Compose(self.transform.transforms[:-2])
        self._mean, self._std = config.mean, config.std

    def pixels(self, image: Image.Image) -> Tensor:
        """An RGB image resized and cropped: uint8 [3, size, size]."""
        pixels: Tensor = pil_to_tensor(self._resize_and_crop(image))
        return pixels

    def normalise(self, pixels: Tensor) -> Tensor:
        """Uint8 [batch, 3, size, size] -> float32 of the same shape, on the same device."""
        return normalise(pixels, self._mean, self._std)


class SharedPreprocess:
    """The inference transforms of models by name, in which every distinct step is done once for all of them.

    Attributes:
        first: the transform of the first model.
        alike: whether all models take the same input.
    """

    def __init__(self, clips: Mapping[str, Clip]) -> None:
        self._each = {name: Preprocess(clip) for name, clip in clips.items()}
        self._geometries = {each.geometry: each.pixels for each in self._each.values()}
        self._distinct = {each.key: each for each in self._each.values()}
        self.first = next(iter(self._each.values()))
        self.alike = len(self._distinct) == 1

    def pixels(self, images: Iterable[Image.Image]) -> dict[str, Tensor]:
        """RGB images, at least one, to `Preprocess.geometry` -> uint8 [images, 3, size, size]; each is held once."""
        cuts = [[cut(image) for cut in self._geometries.values()] for image in images]
        return {geometry: torch.stack(column) for geometry, *column in zip(self._geometries, *cuts, strict=True)}

    def inputs(self, pixels: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
        """What `pixels` gave to model -> its input, float32 [images, 3, size, size] on the device.

        Models with the same transform get the same tensor.
        """
        on_device = {geometry: batch.to(device, non_blocking=True) for geometry, batch in pixels.items()}
        inputs = {key: each.normalise(on_device[each.geometry]) for key, each in self._distinct.items()}
        return {name: inputs[each.key] for name, each in self._each.items()}
