"""Captions to vectors with the text tower of an open_clip model: a pretrained tag, or a model folder trained here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mode.clip.device import autocast, fastest_precision, pick_device
from mode.clip.encode import encode_texts
from mode.clip.model import Clip, folded, write_model_files
from mode.clip.pretrained import open_pretrained
from mode.embedding.base import embedder_folder, read_record


class OpenClipEmbedder:
    """The normalised text features of a CLIP.

    Args:
        clip: the model.
        name: where it came from.
        batch_size: captions in one forward pass.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
    """

    def __init__(self, clip: Clip, name: str, *, batch_size: int = 256, device: str = "auto") -> None:
        self.device = pick_device(device)
        self.clip, self.source, self.batch_size = clip, name, batch_size
        clip.model.eval().to(self.device)

    @classmethod
    def open(cls, name: str, **settings: Any) -> OpenClipEmbedder:
        """Load a CLIP by what `mode.clip.model.open_pretrained` takes; `settings` are those of the class."""
        return cls(open_pretrained(name, "embedding.name"), name, **settings)

    @property
    def name(self) -> str:
        return f"open_clip:{self.source}"

    @property
    def dimensions(self) -> int:
        return self.clip.dimensions

    @property
    def fingerprint(self) -> str:
        """Changes with the weights (their sums are compared: reading them all would take long) and the source."""
        sums = {key: float(value.double().sum()) for key, value in self.clip.model.state_dict().items()}
        return hashlib.sha256(json.dumps([self.source, sums], sort_keys=True).encode()).hexdigest()

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        with autocast(self.device, fastest_precision(self.device)):
            vectors = encode_texts(
                self.clip, captions, batch_size=self.batch_size, device=self.device, name=self.source
            )
        return vectors.cpu().numpy()

    def save(self, folder: Path) -> None:
        """Keep a copy of a model folder, without what only trainings need; a pretrained tag is kept by its name."""
        copied = Path(self.source).is_dir()
        with embedder_folder(folder, "open_clip", source=self.source, copied=copied) as aside:
            if copied:
                write_model_files(aside / "model", folded(self.clip), self.clip.card)

    @classmethod
    def load(cls, folder: Path, device: str = "auto", batch_size: int = 256) -> OpenClipEmbedder:
        """Open what `save` wrote."""
        record = read_record(folder)
        name = str(folder / "model") if record["copied"] else record["source"]
        return cls.open(name, device=device, batch_size=batch_size)
