"""Captions to vectors with any Hugging Face encoder, such as SimCSE (the paper's)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from mode.clip.device import autocast, fastest_precision, pick_device, side_by_side
from mode.clip.trust import check_folder
from mode.embedding.base import embedder_folder, read_record
from mode.errors import ModeError, first_line
from mode.params import View

#: Captions that are tokenised and sorted by length together.
CHUNK = 16_384
#: Tokens in one forward pass on a CPU, at most: what a layer makes of them then stays in the processor's cache.
CPU_TOKENS = 512


class TransformersEmbedder:
    """An encoder whose hidden states are pooled into one unit vector per caption.

    The paper's setting is SimCSE, `princeton-nlp/sup-simcse-bert-base-uncased`; `pooling="pooler"` gives the very
    vectors of its published code, `cls` the first token's state before that last layer.

    Captions are sorted by length within a chunk, so that a batch holds almost no padding, and returned in their order.
    A batch holds at most `batch_size` captions, on a CPU also at most `CPU_TOKENS` tokens. On a GPU the encoder runs in
    bfloat16 autocast.

    Args:
        model, tokenizer: as transformers loads them.
        name: where they came from.
        pooling: `cls` (first token's last state), `mean` (over tokens that are no padding) or `pooler` (the model's
            own `pooler_output`).
        max_tokens: tokens after which a caption is cut.
        batch_size: captions in one forward pass.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
    """

    view: View = "text"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        pooling: str = "cls",
        max_tokens: int = 77,
        batch_size: int = 256,
        device: str = "auto",
    ) -> None:
        self.device = pick_device(device)
        self.model, self.tokenizer = model.eval().to(self.device), tokenizer
        self.source, self.pooling, self.batch_size = name, pooling, batch_size
        longest = getattr(model.config, "max_position_embeddings", None) or max_tokens
        # Encoders of RoBERTa's kind count positions from behind the padding token's number.
        offset = model.config.pad_token_id + 1 if "roberta" in str(model.config.model_type) else 0
        self.max_tokens = min(max_tokens, longest - offset)

    @classmethod
    def open(cls, name: str, *, pooling: str = "cls", **settings: Any) -> TransformersEmbedder:
        """Load an encoder by Hugging Face name or from a local folder; weights as safetensors only, no code of its own.

        Raises:
            ModeError: there is no such encoder, its weights are no safetensors, damaged or not all there, it cannot pad
                captions, or its folder brings code.
        """
        where = f"embedding.name '{name}'"
        if Path(name).is_dir():
            check_folder(Path(name))
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model, loaded = AutoModel.from_pretrained(
                name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # what a damaged folder makes its libraries run into is not to be foreseen
            raise ModeError(
                f"{where}: cannot be opened as a transformers encoder: {first_line(error)}",
                "give a Hugging Face name or a local folder with config.json, a tokenizer and model.safetensors",
            ) from None
        if tokenizer.pad_token is None:
            raise ModeError(f"{where}: its tokenizer has no padding token", "encoders of sentences have one")
        # transformers draws at random what is missing, anew each time. A pooler that nobody asks for may be missing.
        missing = set(loaded["missing_keys"])
        unused = {key for key in missing if pooling != "pooler" and "pooler" in key.split(".")}
        if lacking := sorted(missing - unused):
            what = f"{where}: {len(lacking):,} of its weights are not in its files, such as {lacking[0]}"
            raise ModeError(what, "are its configuration and its weights of one model? fetch it again")
        for key in unused:
            model.get_parameter(key).data.zero_()
        return cls(model, tokenizer, name, pooling=pooling, **settings)

    @property
    def name(self) -> str:
        return f"transformers:{self.source}"

    @property
    def dimensions(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """Changes with weights and settings (of the weights, sums are compared: reading them all would take long)."""
        sums = {key: float(value.double().sum()) for key, value in self.model.state_dict().items()}
        settings = [self.pooling, self.max_tokens, self.tokenizer.get_vocab(), sums]
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        vectors = np.empty((len(captions), self.dimensions), dtype=np.float32)
        on_cpu = self.device.type == "cpu"
        for start in range(0, len(captions), CHUNK):
            chunk = list(captions[start : start + CHUNK])
            tokens = self.tokenizer(chunk, truncation=True, max_length=self.max_tokens)
            by_length = np.argsort([-len(ids) for ids in tokens["input_ids"]], kind="stable")
            first, places, batches = 0, [], []
            while first < len(chunk):
                longest = max(1, len(tokens["input_ids"][by_length[first]]))
                count = max(1, min(self.batch_size, CPU_TOKENS // longest)) if on_cpu else self.batch_size
                rows = by_length[first : first + count]
                first += count
                batch = {key: [values[row] for row in rows] for key, values in tokens.items()}
                places.append(start + rows)
                batches.append(self.tokenizer.pad(batch, return_tensors="pt"))
            with side_by_side(self.device) as run:
                for rows, found in zip(places, run(self._forward, batches), strict=True):
                    vectors[rows] = found
        return vectors

    def _forward(self, batch: Any) -> np.ndarray:
        inputs = batch.to(self.device)
        with torch.inference_mode(), autocast(self.device, fastest_precision(self.device)):
            output = self.model(**inputs)
            pooled = functional.normalize(self._pool(output, inputs["attention_mask"]).float(), dim=-1)
        vectors: np.ndarray = pooled.cpu().numpy()
        return vectors

    def _pool(self, output: Any, mask: torch.Tensor) -> torch.Tensor:
        if self.pooling == "pooler":
            if getattr(output, "pooler_output", None) is None:
                raise ModeError(f"embedding.pooling 'pooler': '{self.source}' has no pooler", "use cls or mean")
            pooled: torch.Tensor = output.pooler_output
            return pooled
        states: torch.Tensor = output.last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        weight = mask.unsqueeze(-1).to(states.dtype)
        return (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def save(self, folder: Path) -> None:
        """Write weights (safetensors), configuration and tokenizer, so that the folder stands by itself."""
        settings = {"source": self.source, "pooling": self.pooling, "max_tokens": self.max_tokens}
        with embedder_folder(folder, "transformers", **settings) as aside:
            self.model.save_pretrained(aside / "encoder", safe_serialization=True)
            self.tokenizer.save_pretrained(aside / "encoder")

    @classmethod
    def load(cls, folder: Path, device: str = "auto", batch_size: int = 256) -> TransformersEmbedder:
        """Open what `save` wrote."""
        record = read_record(folder)
        settings = {"pooling": record["pooling"], "max_tokens": record["max_tokens"], "device": device}
        embedder = cls.open(str(folder / "encoder"), batch_size=batch_size, **settings)
        embedder.source = record["source"]
        return embedder
