"""Latent semantic analysis: TF-IDF without stop words, then a truncated SVD. Needs no weights, fits in seconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mode.checksums import ADVICE
from mode.embedding.base import embedder_folder
from mode.embedding.words import Vocabulary
from mode.errors import ModeError, in_one_line
from mode.params import View


class LsaEmbedder:
    """Captions to the left singular directions of a TF-IDF matrix (Deerwester et al., 1990).

    Equal to scikit-learn's `TfidfVectorizer(stop_words="english")` followed by `TruncatedSVD` and L2 normalisation.

    Args:
        vocabulary: V words.
        idf: float32 [V], inverse document frequency, `ln((1 + captions) / (1 + captions with the word)) + 1`.
        components: float32 [d, V], right singular vectors of the TF-IDF matrix.

    Example:
        >>> captions = ["a red dog", "a blue dog", "red shoes", "blue shoes"]
        >>> embedder = LsaEmbedder.fit(captions, dimensions=2, random_seed=0)
        >>> embedder.encode(["a dog", "of the"]).shape
        (2, 2)
    """

    name = "lsa"
    view: View = "text"

    def __init__(self, vocabulary: Vocabulary, idf: np.ndarray, components: np.ndarray) -> None:
        self.vocabulary, self.idf, self.components = vocabulary, idf, components
        self._directions = np.ascontiguousarray((components * idf).T)

    @property
    def dimensions(self) -> int:
        return len(self.components)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256("\n".join(self.vocabulary.words).encode())
        digest.update(self._directions.tobytes())
        return digest.hexdigest()

    @classmethod
    def fit(cls, captions: Sequence[str], dimensions: int, random_seed: int) -> LsaEmbedder:
        """Learn vocabulary, idf and directions.

        Args:
            captions: the sample to learn from.
            dimensions: d; where there are no more words than that, each word is a direction of its own.
            random_seed: of the randomised SVD.

        Raises:
            ModeError: no caption has a word that is not a stop word.
        """
        # Only here: an embedder that is read needs none of it, and importing it takes most of a second.
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfTransformer

        vocabulary = Vocabulary.learn(captions)
        if not len(vocabulary):
            message = f"lsa: none of {len(captions)} captions has a word to learn from"
            raise ModeError(message, "check the captions of the index")
        counts = vocabulary.count(captions)
        weighting = TfidfTransformer().fit(counts)
        if len(vocabulary) <= dimensions:
            components = np.eye(len(vocabulary), dtype=np.float32)
        else:
            components = TruncatedSVD(dimensions, random_state=random_seed).fit(weighting.transform(counts)).components_
        return cls(vocabulary, weighting.idf_.astype(np.float32), components.astype(np.float32))

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 [captions, d]; the zero vector where no word is known."""
        if not len(captions):
            return np.zeros((0, self.dimensions), dtype=np.float32)
        vectors: np.ndarray = self.vocabulary.count(captions) @ self._directions
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.asarray(np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 1e-12))

    def save(self, folder: Path) -> None:
        """Write `vocabulary.json` and `lsa.safetensors`."""
        with embedder_folder(folder, "lsa", dimensions=self.dimensions) as aside:
            words = json.dumps(self.vocabulary.words, ensure_ascii=False, indent=0)
            (aside / "vocabulary.json").write_text(words, encoding="utf-8")
            arrays = {"idf": self.idf, "components": np.ascontiguousarray(self.components)}
            save_file(arrays, aside / "lsa.safetensors")

    @classmethod
    def load(cls, folder: Path) -> LsaEmbedder:
        """Read what `save` wrote. Raises `ModeError` where a file is missing, or is not what `save` writes."""
        try:
            words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
            arrays = load_file(folder / "lsa.safetensors")
            idf, components = arrays["idf"], arrays["components"]
            texts = isinstance(words, list) and all(isinstance(word, str) for word in words)
            fit = components.ndim == 2 and components.shape[1:] == idf.shape == (len(words),)
            if not texts or not fit or not idf.dtype == components.dtype == np.float32:
                raise ValueError("words, idf and components do not fit together")
            if not (np.isfinite(idf).all() and np.isfinite(components).all()):
                raise ValueError("a number is not finite")
            return cls(Vocabulary(words), idf, components)
        except FileNotFoundError as error:
            raise ModeError(f"{folder}: {Path(error.filename or '').name} is missing", ADVICE) from None
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModeError(f"{folder}: damaged embedder: {in_one_line(error)}", ADVICE) from None
