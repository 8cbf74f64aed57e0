"""A model's inference transform, in two steps that can be shared between models."""

from __future__ import annotations

import json
from dataclasses import fields

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor

from mode.clip.model import Clip


class Preprocess:
    """A model's inference transform in two steps: pixels that can be shared and kept as bytes, then the normalisation.

    Together they give bit by bit what `open_clip.create_model_and_transforms(...)[2]` gives on an RGB image.

    Attributes:
        geometry: a key that is equal for models whose pixels are the same.
        key: a key that is equal for models whose normalised input is the same.
    """

    def __init__(self, clip: Clip) -> None:
        known = {field.name for field in fields(PreprocessCfg)}
        given = {"size": clip.model.visual.image_size, **clip.preprocess_cfg}
        config = PreprocessCfg(**{name: value for name, value in given.items() if name in known})
        shape = [config.size, config.mode, config.interpolation, config.resize_mode, config.fill_color]
        self.geometry = json.dumps(shape)
        self.key = json.dumps([self.geometry, config.mean, config.std])
        # open_clip's last two steps turn pixels into floats and normalise them; the ones before work on the image.
        self._resize_and_crop = Compose(image_transform_v2(config, is_train=False).transforms[:-2])
        self._mean = torch.tensor(config.mean).view(3, 1, 1)
        self._std = torch.tensor(config.std).view(3, 1, 1)

    def pixels(self, image: Image.Image) -> Tensor:
        """An RGB image resized and cropped: uint8 [3, size, size]."""
        pixels: Tensor = pil_to_tensor(self._resize_and_crop(image))
        return pixels

    def normalise(self, pixels: Tensor) -> Tensor:
        """Uint8 [batch, 3, size, size] -> float32 of the same shape, on the same device."""
        device = pixels.device
        return pixels.float().div_(255).sub_(self._mean.to(device)).div_(self._std.to(device))
