"""Images and texts of tasks to unit vectors, for several models at once.

Every image is read and decoded once, whatever the number of models: models with the same geometry (size,
interpolation, crop) share its pixels, and those with the same mean and standard deviation share the normalised batch.
Batches run across the borders of tasks, so that many small tasks cost what one large task of as many images does.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose
from torchvision.transforms.functional import pil_to_tensor

from mode.data.images import UndecodableImage, decode
from mode.errors import ModeError
from mode.evaluation.tasks import ImageBytes, Task
from mode.progress import Progress
from mode.training.model import Clip

#: Batches that are decoded ahead of the models.
_AHEAD = 2

#: Images that a thread decodes before it hands them over: handing over a small one takes nearly as long as decoding it.
_AT_ONCE = 16

Result = TypeVar("Result")


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


def encode_tasks(
    tasks: Sequence[Task],
    models: Mapping[str, Clip],
    *,
    batch_size: int,
    workers: int,
    device: str,
) -> Iterator[tuple[Task, dict[str, Tensor]]]:
    """Encode the images of all tasks with all models, in one pass over the images.

    Memory: the vectors of the tasks that the present batch touches, and a few batches of pixels.

    Args:
        tasks: in any order.
        models: in evaluation mode, on `device`.
        batch_size: images in one forward pass.
        workers: threads that read and decode (at least one is used).
        device: of the models.

    Yields:
        Each task, in order, when its last image is done: (task, model -> unit vectors float32 [images, d] on `device`).

    Raises:
        ModeError: an image cannot be decoded, or a model gives a NaN.
    """
    preprocesses = {name: Preprocess(clip) for name, clip in models.items()}
    geometries = {preprocess.geometry: preprocess.pixels for preprocess in preprocesses.values()}
    images = chain.from_iterable(task.images for task in tasks)
    pending: dict[str, list[Tensor]] = {name: [] for name in models}  # of images whose task is not complete yet
    encoded = 0
    waiting = deque(tasks)
    bar = Progress("evaluate", total=sum(len(task.images) for task in tasks), unit="images")
    with bar, side_by_side(models, device) as run:
        for pixels in _decoded_batches(images, geometries, batch_size, workers):
            count = len(next(iter(pixels.values())))
            vectors = run(partial(_encode_images, models, preprocesses, _normalised(pixels, preprocesses, device)))
            for name in models:
                pending[name].append(vectors[name])
            encoded += count
            bar.update(count)
            while waiting and encoded >= len(waiting[0].images):
                task = waiting.popleft()
                done = len(task.images)
                joined = {name: torch.cat(parts) for name, parts in pending.items()}
                yield task, {name: vectors[:done] for name, vectors in joined.items()}
                pending = {name: [vectors[done:]] for name, vectors in joined.items()}
                encoded -= done


def encode_texts(clip: Clip, texts: Sequence[str], *, batch_size: int, device: str, name: str = "model") -> Tensor:
    """Texts to unit vectors.

    Args:
        clip: in evaluation mode, on `device`.
        texts: n of them.
        batch_size: texts in one forward pass.
        device: of the model.
        name: of the model, in messages.

    Returns:
        float32 [n, d] on `device`.
    """
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    vectors = [_unit_vectors(clip.model.encode_text, clip.tokenizer(list(batch)).to(device), name) for batch in batches]
    return torch.cat(vectors) if vectors else torch.empty(0, 0, device=device)


def encode_prompts(
    clip: Clip, prompts: Sequence[Sequence[str]], *, batch_size: int, device: str, name: str = "model"
) -> Tensor:
    """One unit vector per class: the mean of the unit vectors of its prompts, normalised again (as open_clip does it).

    Args:
        clip: in evaluation mode, on `device`.
        prompts: those of each of L classes, at least one each; they are encoded in batches across classes.
        batch_size: texts in one forward pass.
        device: of the model.
        name: of the model, in messages.

    Returns:
        float32 [L, d] on `device`.
    """
    sums: Tensor | None = None
    texts = ((number, text) for number, group in enumerate(prompts) for text in group)
    while batch := list(islice(texts, batch_size)):
        vectors = encode_texts(clip, [text for _, text in batch], batch_size=batch_size, device=device, name=name)
        if sums is None:
            sums = torch.zeros(len(prompts), vectors.shape[1], device=device)
        sums.index_add_(0, torch.tensor([number for number, _ in batch], device=device), vectors)
    return F.normalize(sums, dim=-1) if sums is not None else torch.empty(0, 0, device=device)


@contextmanager
def side_by_side(
    models: Collection[str], device: str
) -> Iterator[Callable[[Callable[[str], Result]], dict[str, Result]]]:
    """Call a function for every model: at the same time on a CPU's cores, one after another on a GPU.

    Two small models on two cores take about half the time of one after the other on both, where torch's threads wait
    for each other in every operation. The calling thread's number of torch threads is divided among them; it keeps such
    a share itself meanwhile, since more threads than cores wait for each other in its own small operations as well.

    Args:
        models: names.
        device: of the models.

    Yields:
        A function that takes `function(name)` and returns name -> result, in the order of `models`.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(models)) if torch.device(device).type == "cpu" else 1
    if workers <= 1:
        yield lambda function: {name: function(name) for name in models}
        return
    with ThreadPoolExecutor(workers) as pool:
        torch.set_num_threads(threads // workers)  # of this thread, and of those begun from now on: the pool's
        try:
            yield lambda function: dict(zip(models, pool.map(function, models), strict=True))
        finally:
            torch.set_num_threads(threads)


def _encode_images(
    models: Mapping[str, Clip], preprocesses: Mapping[str, Preprocess], inputs: Mapping[str, Tensor], name: str
) -> Tensor:
    return _unit_vectors(models[name].model.encode_image, inputs[preprocesses[name].key], name)


def _normalised(pixels: Mapping[str, Tensor], preprocesses: Mapping[str, Preprocess], device: str) -> dict[str, Tensor]:
    """Geometry -> pixels to `Preprocess.key` -> a model's input on the device."""
    on_device = {geometry: batch.to(device, non_blocking=True) for geometry, batch in pixels.items()}
    distinct = {preprocess.key: preprocess for preprocess in preprocesses.values()}
    return {key: preprocess.normalise(on_device[preprocess.geometry]) for key, preprocess in distinct.items()}


def _unit_vectors(encode: Callable[[Tensor], Any], batch: Tensor, name: str) -> Tensor:
    with torch.inference_mode():
        vectors = F.normalize(encode(batch).float(), dim=-1)
    if not bool(torch.isfinite(vectors).all()):
        raise ModeError(f"model '{name}' gives NaN or infinite vectors", "its training failed: train it again")
    return vectors


def _decoded_batches(
    images: Iterable[ImageBytes],
    geometries: Mapping[str, Callable[[Image.Image], Tensor]],
    batch_size: int,
    workers: int,
) -> Iterator[dict[str, Tensor]]:
    """Geometry -> uint8 [batch, 3, size, size], in order, decoded by threads ahead of the consumer."""

    def decoded(some: Sequence[ImageBytes]) -> dict[str, Tensor]:
        rgb = [_decode_rgb(image) for image in some]
        return {geometry: torch.stack([pixels(image) for image in rgb]) for geometry, pixels in geometries.items()}

    remaining = iter(images)
    ahead: deque[list[Future[dict[str, Tensor]]]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            while True:
                while len(ahead) <= _AHEAD and (batch := list(islice(remaining, batch_size))):
                    parts = (batch[start : start + _AT_ONCE] for start in range(0, len(batch), _AT_ONCE))
                    ahead.append([pool.submit(decoded, part) for part in parts])
                if not ahead:
                    return
                done = [future.result() for future in ahead.popleft()]
                yield {geometry: torch.cat([part[geometry] for part in done]) for geometry in geometries}
        finally:
            pool.shutdown(cancel_futures=True)


def _decode_rgb(image: ImageBytes) -> Image.Image:
    """Decode and convert to RGB before any resizing, as webdataset's `pil` decoder does."""
    try:
        return decode(image.read()).convert("RGB")
    except UndecodableImage as error:
        raise ModeError(f"{image.tar}: image {image.key} cannot be decoded: {error}", "fetch the task again") from None
