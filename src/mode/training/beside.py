"""What is done with a model while it trains, and leaves no trace in it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from mode.clip.configuration import read_card
from mode.clip.encode import encode_texts, unit_vectors
from mode.clip.folder import CARD
from mode.clip.model import Clip, folded, save_sealed
from mode.data.images import normalise
from mode.data.loading.store import ImageStore
from mode.params import KeepParams
from mode.training.learner import loss_of, scalars_of
from mode.training.plan import Training


class Beside(Protocol):
    """Something that is done at some steps of a training, by the process that leads, while the others wait."""

    def due(self, step: int) -> bool:
        """Whether it is to be done when `step` steps are made; the same in every process."""

    def done(self, step: int) -> bool:
        """Whether an interrupted run has done it."""

    def do(self, step: int, clip: Clip) -> dict[str, float]:
        """Do it; returns figures to show."""


@contextmanager
def for_inference(clip: Clip) -> Iterator[Clip]:
    """A model as it is used when it is trained: in evaluation mode, in float32.

    The model itself is as it was afterwards, each of its modules in its mode, and so is torch's random state.
    """
    device = next(clip.model.parameters()).device
    modes = {module: module.training for module in clip.model.modules()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        clip.model.eval()
        try:
            if all(parameter.dtype == torch.float32 for parameter in clip.model.parameters()):
                yield clip
            else:
                yield replace(clip, model=copy.deepcopy(clip.model).float())
        finally:
            for module, training in modes.items():
                module.training = training


class HeldOut:
    """Pairs that no model is trained on, and the contrastive loss of a model on them.

    Args:
        training: what is trained; its source and the preparation of its images.
        rows: the pairs, of the training's index: at least one, and one of each image. Those whose image is bad are left
            out; if none is left, its length is 0, and there is no loss.
        root: what relative paths of shards are relative to.

    Raises:
        ModeError: shards are missing, or others than were indexed.
    """

    def __init__(self, training: Training, rows: NDArray[np.int64], root: Path) -> None:
        image = training.image.model_copy(update={"crop_scale": None, "decode": "fast"})
        pixels, good = ImageStore(training.index, root, image, cache_mb=0, rows=rows).load(rows)
        self._pixels = pixels[torch.from_numpy(good)]
        self._captions = training.index.captions(rows[good])
        self._image, self._batch_size = image, training.recipe.batch_size

    def __len__(self) -> int:
        return len(self._captions)

    def loss(self, clip: Clip, batch_size: int) -> float:
        """Mean over batches as large as the training's, to be compared with its loss; what fills none is left out.

        Fewer pairs than that are one batch, whose loss is lower, for each pair has fewer others to be taken for.

        Args:
            clip: in evaluation mode, in float32, on any device.
            batch_size: of inference.

        Raises:
            ModeError: the model gives NaN.
        """
        device = next(clip.model.parameters()).device
        parts = (part.to(device) for part in torch.split(self._pixels, batch_size))
        inputs = (normalise(part, self._image.mean, self._image.std) for part in parts)
        images = torch.cat([unit_vectors(clip.model.encode_image, part, "in training") for part in inputs])
        texts = encode_texts(clip, self._captions, batch_size=batch_size, device=device, name="in training")
        size = min(self._batch_size, len(self))
        whole = len(self) // size * size
        with torch.inference_mode():
            loss, scalars = loss_of(clip.model), scalars_of(clip.model)
            pairs = zip(torch.split(images[:whole], size), torch.split(texts[:whole], size), strict=True)
            return float(torch.stack([loss(some, their, *scalars) for some, their in pairs]).mean())


class KeptModels:
    """Models of the way: a folder for each, named by its step, which any program opens as it opens a finished model.

    Those of another configuration go when the first of this one is written.

    Args:
        training: whose model it is.
        params: when, and how many.
        folder: of the folders.
    """

    def __init__(self, training: Training, params: KeepParams, folder: Path) -> None:
        self._training, self._params, self._folder = training, params, folder

    def due(self, step: int) -> bool:
        every = self._params.every
        return every is not None and step % every == 0 and step > self._training.plan.first_step

    def done(self, step: int) -> bool:
        return step in self._steps()

    def do(self, step: int, clip: Clip) -> dict[str, float]:
        plan = self._training.plan
        card = {
            "name": plan.name,
            "role": plan.role.name,
            "unfinished": {"step": step, "of": plan.last_step},
            "samples_seen": step * plan.batch_size,
            "provenance": {"configuration": self._training.fingerprint},
        }
        save_sealed(self._folder / str(step), folded(clip), card)  # an adapter's base does not lie beside it there
        steps = self._steps()
        kept = steps if self._params.last is None else steps[-self._params.last :]
        for folder in self._folder.iterdir():
            if folder.name not in map(str, kept):
                shutil.rmtree(folder)
        return {}

    def _steps(self) -> list[int]:
        """Those of this configuration that are there."""
        folders = self._folder.iterdir() if self._folder.is_dir() else ()
        return sorted(
            int(folder.name)
            for folder in folders
            if folder.name.isdecimal()
            and (folder / CARD).is_file()
            and read_card(folder).get("provenance", {}).get("configuration") == self._training.fingerprint
        )
