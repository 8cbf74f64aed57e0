"""Encoded images to pixels of the size that a model takes: exactly as open_clip, or as fast as the machine can.

A photograph of 500 x 375 takes about 1 ms to decode and 2 ms to resize with Pillow. torch resizes bytes with the
processor's vector instructions, five times as fast, but with coefficients of 16 bits, so that one value in some 200 is
rounded the other way (a difference of 1 in 255). Training does not notice; evaluation, whose figures have to be those
of other programs, stays with Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mode.data.images import UndecodableImage, decode, open_image, resize_and_crop, to_array
from mode.data.loading.augment import random_box, random_crop
from mode.params import ImageParams


def training_pixels(content: bytes, image: ImageParams, position: int | None, random_seed: int) -> np.ndarray:
    """Pixels of one encoded image for training.

    Args:
        content: an encoded image.
        image: size, `crop_scale`, and `decode`: with `exact` the result is bit for bit that of open_clip's transform.
            Otherwise JPEGs (RGB or grey) are resized by torch; what needs no resizing is the same either way.
        position, random_seed: decide the random part if `crop_scale` is set; `position` None takes the centre.

    Returns:
        uint8 [3, size, size].

    Raises:
        UndecodableImage: it cannot be decoded.
    """
    if image.decode != "exact" and image.resize_mode != "longest" and _is_plain_jpeg(content):
        [pixels] = _decode_batch([content], torch.device("cpu"))
        if pixels is not None:
            resized: np.ndarray = _resize_for_training(pixels, image, position, random_seed).numpy()
            return resized
    picture = decode(content)
    if image.crop_scale is None or position is None:
        return _whole(picture, image)
    return random_crop(picture, image.size, image.crop_scale, random_seed, position, image.crop_ratio)


def _whole(picture: Image.Image, image: ImageParams) -> np.ndarray:
    """All of a picture, or its middle, as `image.resize_mode` says: bit for bit as open_clip's transform."""
    if (image.interpolation, image.resize_mode) == ("bicubic", "shortest"):
        return resize_and_crop(picture, image.size)
    transform = _open_clip_transform(image.size, image.interpolation, image.resize_mode, image.fill_color)
    return to_array(transform(picture))


@lru_cache
def _open_clip_transform(size: int, interpolation: str, resize_mode: str, fill_color: int) -> Any:
    """Its steps up to the pixels, PIL image to PIL image."""
    from open_clip.transform import PreprocessCfg, image_transform_v2
    from torchvision.transforms import Compose

    config = PreprocessCfg(size, interpolation=interpolation, resize_mode=resize_mode, fill_color=fill_color)
    return Compose(image_transform_v2(config, is_train=False).transforms[:-2])


def pixels_on_device(
    contents: Sequence[bytes], image: ImageParams, positions: np.ndarray | None, random_seed: int, device: torch.device
) -> tuple[Tensor, np.ndarray]:
    """As `training_pixels` for a whole batch, JPEGs decoded and resized on `device`, which is meant to be a GPU.

    What the device cannot decode (other formats, CMYK, damaged files) is tried by itself on the CPU. Beside a training
    on the same GPU, call it in `aside`.

    Args:
        contents: encoded images.
        image, random_seed: as in `training_pixels`.
        positions: int [batch], or None for centres.
        device: of the result.

    Returns:
        uint8 [batch, 3, size, size] on `device`, zeros where an image cannot be decoded; and bool [batch]: which could.
    """
    out = torch.zeros(len(contents), 3, image.size, image.size, dtype=torch.uint8, device=device)
    good = np.ones(len(contents), dtype=bool)
    suits = [image.resize_mode != "longest" and _is_plain_jpeg(content) for content in contents]
    suited = np.flatnonzero(suits).tolist()
    decoded = dict(zip(suited, _decode_batch([contents[number] for number in suited], device), strict=True))
    for number, content in enumerate(contents):
        position = None if positions is None else int(positions[number])
        pixels = decoded.get(number)
        if pixels is not None:
            out[number] = _resize_for_training(pixels, image, position, random_seed)
            continue
        try:
            out[number] = torch.from_numpy(training_pixels(content, image, position, random_seed).copy())
        except Exception:  # what Pillow raises on damaged files is not to be foreseen; the loader counts and replaces
            good[number] = False
    return out, good


@contextmanager
def aside(device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
    """Decode in the block beside what else the GPU computes; what leaves the block goes through the function given.

    nvJPEG writes an image at once, although kernels that were queued before may still read what was in that memory
    (pytorch/vision#9606, meta-pytorch/torchcodec#1634): on the stream of a training, activations of the step under way,
    whose loss is then NaN. A stream of its own has memory of its own, and is waited for at the end of the block. On a
    CPU there is nothing to do.
    """
    if device.type != "cuda":
        yield lambda pixels: pixels
        return
    training, stream = torch.cuda.current_stream(device), _stream_on(device)

    def hand_over(pixels: Tensor) -> Tensor:
        pixels.record_stream(training)  # its memory is not given away before the training is done with it
        return pixels

    with torch.cuda.stream(stream):
        yield hand_over
    stream.synchronize()


@lru_cache
def _stream_on(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _resize_for_training(pixels: Tensor, image: ImageParams, position: int | None, random_seed: int) -> Tensor:
    box = None
    if image.crop_scale is not None and position is not None:
        box = random_box((pixels.shape[2], pixels.shape[1]), image.crop_scale, random_seed, position, image.crop_ratio)
        return resize(pixels, image.size, box)
    if image.resize_mode == "squash":
        box = (0, 0, pixels.shape[2], pixels.shape[1])
    return resize(pixels, image.size, box, image.interpolation)


def resize(
    pixels: Tensor, size: int, box: tuple[int, int, int, int] | None = None, interpolation: str = "bicubic"
) -> Tensor:
    """With antialiasing, as torchvision resizes tensors.

    Args:
        pixels: uint8 [3, height, width].
        size: of the result.
        box: left, top, right, bottom of the part to take; None: the shorter side becomes `size` and the centre is cut
            out, at the same place as `resize_and_crop`.
        interpolation: `bicubic` or `bilinear`.

    Returns:
        uint8 [3, size, size] on the same device.
    """
    if box is not None:
        left, top, right, bottom = box
        return _interpolate(pixels[:, top:bottom, left:right], (size, size), interpolation)
    height, width = pixels.shape[1:]
    shorter = min(width, height)
    if shorter != size:
        width, height = int(size * width / shorter), int(size * height / shorter)
        pixels = _interpolate(pixels, (height, width), interpolation)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return pixels[:, top : top + size, left : left + size]


def _interpolate(pixels: Tensor, extent: tuple[int, int], mode: str) -> Tensor:
    if pixels.device.type == "cpu":
        return F.interpolate(pixels[None], extent, mode=mode, antialias=True)[0]
    # On a GPU only floats are resized; bicubic overshoots, and bytes would wrap around.
    resized = F.interpolate(pixels[None].float(), extent, mode=mode, antialias=True)[0]
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _is_plain_jpeg(content: bytes) -> bool:
    """RGB or grey, and of a size that `decode` takes (only the header is looked at)."""
    if content[:2] != b"\xff\xd8" or _jpeg_decoder() is None:
        return False
    try:
        with open_image(content) as header:
            return header.format == "JPEG" and header.mode in ("RGB", "L")
    except UndecodableImage:
        return False


@lru_cache
def _jpeg_decoder() -> Callable[..., Any] | None:
    """What decodes JPEGs in torch, to RGB; None where torchvision has it no more.

    Imported late: other images need no torchvision, which takes seconds to import.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:  # torchvision 0.29 announces that a later one will be without; Pillow does it all then
        return None
    return partial(decode_jpeg, mode=ImageReadMode.RGB)


def _decode_batch(contents: Sequence[bytes], device: torch.device) -> list[Tensor | None]:
    """uint8 [3, height, width] of each on the device, None where one cannot be decoded."""
    # `bytearray`, because torch warns of memory that it may not write to.
    encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    if not encoded:
        return []
    decode_jpeg = _jpeg_decoder()
    assert decode_jpeg is not None  # or none of them would be plain
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # before memory is written to anew, see `aside`
        with suppress(RuntimeError):  # one of them: find out which
            return list(decode_jpeg(encoded, device=device))
    decoded: list[Tensor | None] = []
    for each in encoded:
        try:
            decoded.append(decode_jpeg(each, device=device))
        except (RuntimeError, MemoryError):
            decoded.append(None)
    return decoded
