"""Captions, or images too, to vectors with the towers of an open_clip model: a pretrained tag, or a model folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from mode.clip.device import autocast, fastest_precision, pick_device, side_by_side
from mode.clip.encode import unit_vectors
from mode.clip.model import Clip, folded, write_model_files
from mode.clip.preprocess import Preprocess
from mode.clip.pretrained import open_pretrained
from mode.embedding.base import embedder_folder, read_record
from mode.errors import ModeError
from mode.params import View

#: Captions or images in one forward pass on a CPU, at most: what a layer makes of them stays in the processor's cache,
#: and many passes side by side need little memory.
CPU_BATCH = 64


class OpenClipEmbedder:
    """The normalised features of a CLIP.

    Args:
        clip: the model.
        name: where it came from.
        view: what of a pair is embedded. A vector of `both` is that of the caption and that of the image one after the
            other, each scaled by the root of 1/2, so that the whole has length 1 (the paper's "image + text").
        batch_size: captions or images in one forward pass; on a CPU `CPU_BATCH` at most.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
    """

    def __init__(
        self, clip: Clip, name: str, *, view: View = "text", batch_size: int = 256, device: str = "auto"
    ) -> None:
        self.device = pick_device(device)
        self.clip, self.source, self.view, self.batch_size = clip, name, view, batch_size
        clip.model.eval().to(self.device)

    @classmethod
    def open(cls, name: str, **settings: Any) -> OpenClipEmbedder:
        """Load a CLIP by what `mode.clip.pretrained.open_pretrained` takes; `settings` are those of the class."""
        return cls(open_pretrained(name, "embedding.name"), name, **settings)

    @property
    def name(self) -> str:
        return f"open_clip:{self.source}"

    @property
    def dimensions(self) -> int:
        return self.clip.dimensions * (2 if self.view == "both" else 1)

    @property
    def fingerprint(self) -> str:
        """Changes with the weights (their sums are compared: reading them all would take long), source and view."""
        sums = {key: float(value.double().sum()) for key, value in self.clip.model.state_dict().items()}
        parts = [self.source, sums] if self.view == "text" else [self.source, sums, self.view]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def preprocess(self) -> Preprocess:
        """The model's inference transform, as evaluation has it."""
        return Preprocess(self.clip)

    def of_texts(self) -> OpenClipEmbedder:
        """The same CLIP, for captions alone."""
        settings: dict[str, Any] = {"batch_size": self.batch_size, "device": str(self.device)}
        return OpenClipEmbedder(self.clip, self.source, **settings)

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        def forward(tokens: Tensor) -> Tensor:
            with autocast(self.device, fastest_precision(self.device)):
                return unit_vectors(self.clip.model.encode_text, tokens.to(self.device), self.source)

        size = self._largest_batch
        # Here, for a tokenizer serves one thread at a time.
        tokens = [self.clip.tokenizer(list(captions[first : first + size])) for first in range(0, len(captions), size)]
        return self._together(forward, tokens)

    def encode_images(self, pixels: Tensor) -> np.ndarray:
        """Vectors of images, float32 [n, d], unit rows; `pixels`: uint8 [n, 3, size, size], of `preprocess`."""

        def forward(batch: Tensor) -> Tensor:
            with autocast(self.device, fastest_precision(self.device)):
                inputs = self.preprocess.normalise(batch.to(self.device))
                return unit_vectors(self.clip.model.encode_image, inputs, self.source)

        batches = torch.split(pixels, self._largest_batch) if len(pixels) else ()
        return self._together(forward, batches)

    @property
    def _largest_batch(self) -> int:
        return min(self.batch_size, CPU_BATCH) if self.device.type == "cpu" else self.batch_size

    def _together(self, forward: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> np.ndarray:
        with side_by_side(self.device) as run:
            vectors = run(forward, batches)
        empty = torch.empty(0, self.clip.dimensions, device=self.device)
        return torch.cat([empty, *vectors]).cpu().numpy()

    def save(self, folder: Path) -> None:
        """Keep a copy of a model folder, without what only trainings need; a pretrained tag is kept by its name."""
        copied = Path(self.source).is_dir()
        view = {} if self.view == "text" else {"view": self.view}
        with embedder_folder(folder, "open_clip", source=self.source, copied=copied, **view) as aside:
            if copied:
                write_model_files(aside / "model", folded(self.clip), self.clip.card)

    @classmethod
    def load(cls, folder: Path, device: str = "auto", batch_size: int = 256) -> OpenClipEmbedder:
        """Open what `save` wrote."""
        record = read_record(folder)
        name = str(folder / "model") if record["copied"] else record["source"]
        view = record.get("view", "text")
        if view not in get_args(View):
            raise ModeError(f"{folder}: an embedder of unknown view '{view}'", "it needs a newer version of mode")
        return cls.open(name, view=view, device=device, batch_size=batch_size)
