"""Images and texts of tasks to unit vectors, for several models at once.

Every image is read and decoded once, whatever the number of models (`mode.clip.preprocess.SharedPreprocess`).
Batches run across the borders of tasks, so that many small tasks cost what one large task of as many images does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import chain, islice

import torch
from PIL import Image
from torch import Tensor

from mode.clip.device import side_by_side
from mode.clip.encode import encode_prompts, unit_vectors
from mode.clip.model import Clip
from mode.clip.preprocess import SharedPreprocess
from mode.data.images import UndecodableImage, decode
from mode.errors import ModeError
from mode.evaluation.tasks import ImageBytes, Task
from mode.progress import Progress

#: Batches that are decoded ahead of the models.
_AHEAD = 2

#: Images that a thread decodes before it hands them over: handing over a small one takes nearly as long as decoding it.
_AT_ONCE = 16


def encode_metadata(
    tasks: Sequence[Task], models: Mapping[str, Clip], *, batch_size: int, device: str
) -> dict[str, tuple[Tensor, ...]]:
    """Encode the classes or texts of all tasks with all models, in batches across the tasks.

    Args:
        tasks: in any order.
        models, batch_size, device: as of `encode_tasks`.

    Returns:
        Model -> for each task its unit vectors float32 [classes or texts, d] on `device`.
    """
    prompts = [prompts for task in tasks for prompts in task.prompts]

    def encode(name: str) -> Tensor:
        return encode_prompts(models[name], prompts, batch_size=batch_size, device=device, name=name)

    with side_by_side(torch.device(device), len(models)) as run:
        vectors = run(encode, models)
    of_tasks = [len(task.prompts) for task in tasks]
    return {name: torch.split(rows, of_tasks) for name, rows in zip(models, vectors, strict=True)}


def encode_tasks(
    tasks: Sequence[Task],
    models: Mapping[str, Clip],
    *,
    batch_size: int,
    workers: int,
    device: str,
    silent: bool = False,
    title: str = "evaluate",
) -> Iterator[tuple[Task, dict[str, Tensor]]]:
    """Encode the images of all tasks with all models, in one pass over the images.

    Memory: the vectors of the tasks that the present batch touches, and a few batches of pixels.

    Args:
        tasks: in any order.
        models: in evaluation mode, on `device`.
        batch_size: images in one forward pass.
        workers: threads that read and decode (at least one is used).
        device: of the models.
        silent: show no progress.
        title: of the progress.

    Yields:
        Each task, in order, when its last image is done: (task, model -> unit vectors float32 [images, d] on `device`).

    Raises:
        ModeError: an image cannot be decoded, or a model gives a NaN.
    """
    preprocess = SharedPreprocess(models)
    images = chain.from_iterable(task.images for task in tasks)
    pending: dict[str, list[Tensor]] = {name: [] for name in models}  # of images whose task is not complete yet
    encoded = 0
    waiting = deque(tasks)
    bar = None if silent else Progress(title, total=sum(len(task.images) for task in tasks), unit="images")
    with bar or nullcontext(), side_by_side(torch.device(device), len(models)) as run:
        for pixels in _decoded_batches(images, preprocess, batch_size, workers):
            count = len(next(iter(pixels.values())))
            found = run(partial(_encode_images, models, preprocess.inputs(pixels, device)), models)
            for name, vectors in zip(models, found, strict=True):
                pending[name].append(vectors)
            encoded += count
            if bar:
                bar.update(count)
            while waiting and encoded >= len(waiting[0].images):
                task = waiting.popleft()
                done = len(task.images)
                joined = {name: torch.cat(parts) for name, parts in pending.items()}
                yield task, {name: vectors[:done] for name, vectors in joined.items()}
                pending = {name: [vectors[done:]] for name, vectors in joined.items()}
                encoded -= done


def _encode_images(models: Mapping[str, Clip], inputs: Mapping[str, Tensor], name: str) -> Tensor:
    return unit_vectors(models[name].model.encode_image, inputs[name], name)


def _decoded_batches(
    images: Iterable[ImageBytes], preprocess: SharedPreprocess, batch_size: int, workers: int
) -> Iterator[dict[str, Tensor]]:
    """Geometry -> uint8 [batch, 3, size, size], in order, decoded by threads ahead of the consumer."""

    def decoded(some: Sequence[ImageBytes]) -> dict[str, Tensor]:
        return preprocess.pixels([_decode_rgb(image) for image in some])

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
                yield {geometry: torch.cat([part[geometry] for part in done]) for geometry in done[0]}
        finally:
            pool.shutdown(cancel_futures=True)


def _decode_rgb(image: ImageBytes) -> Image.Image:
    """Decode and convert to RGB before any resizing, as webdataset's `pil` decoder does."""
    try:
        return decode(image.read()).convert("RGB")
    except UndecodableImage as error:
        raise ModeError(f"{image.tar}: image {image.key} cannot be decoded: {error}", "fetch the task again") from None
