"""Captions to vectors with the text tower of an open_clip model: a pretrained tag, or a model folder trained here."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch

from mode.clip.device import pick_device
from mode.embedding.store import embedder_folder, read_record
from mode.errors import ModeError


class OpenClipEmbedder:
    """The normalised text features of a CLIP.

    Args:
        model, tokenizer: as open_clip makes them.
        name: where they came from.
        batch_size: captions in one forward pass.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, *, batch_size: int = 256, device: str = "auto") -> None:
        self.device = pick_device(device)
        self.model, self.tokenizer = model.eval().to(self.device), tokenizer
        self.source, self.batch_size = name, batch_size
        with torch.inference_mode():
            features = self.model.encode_text(self.tokenizer([""]).to(self.device))
        self._dimensions = int(features.shape[-1])

    @classmethod
    def open(cls, name: str, **settings: Any) -> OpenClipEmbedder:
        """Load a CLIP.

        Args:
            name: `MODEL:PRETRAINED`, such as `ViT-B-32:laion2b_s34b_b79k`, or a model folder (relative to the working
                directory) with open_clip's configuration, weights and tokenizer.
            settings: as for the class.

        Raises:
            ModeError: there is no such model, tag or folder, or open_clip cannot open it.
        """
        if Path(name).is_dir():
            model_name, tag = f"local-dir:{Path(name).resolve()}", None
            tokenizer_name = model_name
        else:
            model_name, _, tag = name.partition(":")
            known = open_clip.list_pretrained_tags_by_model(model_name)
            if tag not in known:
                raise ModeError(
                    f"embedding.name '{name}': neither a folder nor a MODEL:PRETRAINED that open_clip knows",
                    f"{model_name} has {', '.join(known)}" if known else "see open_clip.list_pretrained()",
                )
            tokenizer_name = model_name
        try:
            model = open_clip.create_model(model_name, pretrained=tag)
            tokenizer = open_clip.get_tokenizer(tokenizer_name)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModeError(f"embedding.name '{name}': open_clip cannot open it: {first_line}") from None
        return cls(model, tokenizer, name, **settings)

    @property
    def name(self) -> str:
        """Kind and source."""
        return f"open_clip:{self.source}"

    @property
    def dimensions(self) -> int:
        """Length of a text feature."""
        return self._dimensions

    @property
    def fingerprint(self) -> str:
        """Changes with the weights (their sums are compared: reading them all would take long) and the source."""
        sums = {key: float(value.double().sum()) for key, value in self.model.state_dict().items()}
        return hashlib.sha256(json.dumps([self.source, sums], sort_keys=True).encode()).hexdigest()

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 [captions, dimensions], in the captions' order."""
        vectors = np.empty((len(captions), self.dimensions), dtype=np.float32)
        on_gpu = self.device.type == "cuda"
        for start in range(0, len(captions), self.batch_size):
            tokens = self.tokenizer(list(captions[start : start + self.batch_size])).to(self.device)
            with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
                features = self.model.encode_text(tokens)
            features = torch.nn.functional.normalize(features.float(), dim=-1)
            vectors[start : start + self.batch_size] = features.cpu().numpy()
        return vectors

    def save(self, folder: Path) -> None:
        """Keep a copy of a model folder; a pretrained tag is kept by its name."""
        source = Path(self.source)
        with embedder_folder(folder, "open_clip", source=self.source, copied=source.is_dir()) as aside:
            if source.is_dir():
                shutil.copytree(source, aside / "model")

    @classmethod
    def load(cls, folder: Path, device: str = "auto", batch_size: int = 256) -> OpenClipEmbedder:
        """Open what `save` wrote."""
        record = read_record(folder)
        name = str(folder / "model") if record["copied"] else record["source"]
        return cls.open(name, device=device, batch_size=batch_size)
