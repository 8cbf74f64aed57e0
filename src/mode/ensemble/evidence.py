"""What `routing.kind: evidence` knows of the experts' training captions: where they lie, and which words they use.

Two looks at the same captions. Their *vectors* say how densely an expert's captions lie around a class
(`mode.ensemble.rules.log_densities`). But an embedder of words, such as `lsa`, knows only those of the captions that it
was fitted on: to it, the class names of a domain that came later are nothing but the words of their templates. So the
*words* themselves are counted, too (`mode.ensemble.rules.word_scores`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix
from scipy.special import softmax

from mode.embedding.base import Embedder
from mode.embedding.words import Vocabulary
from mode.ensemble.rules import (
    calibrate_evidence,
    calibrate_factors,
    log_densities,
    partial_captions,
    word_scores,
)
from mode.errors import ModeError
from mode.vectors import LARGEST, within

#: What a folder holds of it.
VECTORS, WORDS = "evidence.safetensors", "evidence.json"


class Captions(NamedTuple):
    """Some training captions of an expert, each with its vector.

    Attributes:
        texts: at least one.
        vectors: by the router's embedder, [texts, d], any float type.
    """

    texts: Sequence[str]
    vectors: NDArray[np.floating]


@dataclass(frozen=True)
class Evidence:
    """A sample of every expert's training captions, and how much the two looks at them count.

    Attributes:
        vectors: expert -> float16 [n, d], n at least 1.
        words: W distinct words in lower case.
        counts: [experts, W], captions of each expert's sample that use the word.
        sizes: [experts], captions in each sample.
        temperature: of the densities, in squared units of distance.
        factors: of the log densities and of the words' scores, both at least 0.
    """

    vectors: Mapping[str, NDArray[np.float16]]
    words: Sequence[str]
    counts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    temperature: float
    factors: tuple[float, float]

    @classmethod
    def fit(cls, captions: Mapping[str, Captions], embedder: Embedder, most: int, random_seed: int) -> Evidence:
        """Temperature and factors under which captions with half their words best tell whose they are.

        Args:
            captions: a random sample of every expert's; those that the embedder knows no word of are left out.
            embedder: of their vectors.
            most: captions that are halved, as many of each expert; none of them is its own evidence.
            random_seed: of their draw and of the words that are left out.

        Raises:
            ModeError: vectors that are not of these captions and this embedder, or captions of an expert that say
                nothing to it.
        """
        known = {name: _known(name, each, embedder) for name, each in captions.items()}
        vectors = {name: each.vectors.astype(np.float16) for name, each in known.items()}
        texts = [text for each in known.values() for text in each.texts]
        sizes = np.array([len(each.texts) for each in known.values()])
        vocabulary = Vocabulary.learn(texts)
        used = _uses(vocabulary, texts)
        first = np.concatenate([[0], np.cumsum(sizes)])
        counts = np.stack([used[a:b].sum(axis=0).A1 for a, b in pairwise(first)]).astype(np.int64)

        random, part = np.random.default_rng(random_seed), max(1, most // len(known))
        rows = [random.permutation(size)[:part] for size in sizes]
        owners, row = np.repeat(np.arange(len(rows)), [len(each) for each in rows]), np.concatenate(rows)
        halves = partial_captions([texts[number] for number in (first[owners] + row).tolist()], random_seed)
        partial = embedder.encode(halves)
        useful = np.asarray(partial.any(axis=1))
        if not useful.any():
            raise _nothing_known(len(halves), "with half their words", embedder)
        owners, row, partial = owners[useful], row[useful], partial[useful]
        temperature, densities = calibrate_evidence(partial, vectors, owners, row)
        left = _uses(vocabulary, [halves[number] for number in np.flatnonzero(useful).tolist()])
        factors = calibrate_factors(densities, word_scores(left, counts, sizes, owners), owners)
        return cls(vectors, vocabulary.words, counts, sizes, temperature, factors)

    def posteriors(
        self, metadata: Sequence[Sequence[str]], vectors: NDArray[np.floating]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """p(expert | class), [classes, experts], rows of sum 1; and which classes say anything, [classes].

        Args:
            metadata: the prompts of each class.
            vectors: of the classes, [classes, d]; zero where the embedder knows no word.
        """
        used = _uses(Vocabulary(self.words), [*chain.from_iterable(metadata)])
        owners = [number for number, prompts in enumerate(metadata) for _ in prompts]
        scores, said = np.zeros((len(metadata), len(self.sizes))), np.zeros(len(metadata), np.int64)
        np.add.at(scores, owners, word_scores(used, self.counts, self.sizes))
        np.add.at(said, owners, used.getnnz(axis=1))
        scores /= np.maximum(1, np.bincount(owners, minlength=len(metadata)))[:, None]
        known = np.asarray(vectors.any(axis=1))
        densities = np.zeros_like(scores)
        densities[known] = log_densities(vectors[known], self.vectors, self.temperature)
        found = softmax(self.factors[0] * densities + self.factors[1] * scores, axis=1)
        return np.asarray(found), known | (said > 0)

    def save(self, folder: Path) -> None:
        """Write `evidence.safetensors` (vectors) and `evidence.json` (all else) into a folder that is there."""
        vectors = {name: np.ascontiguousarray(each, np.float16) for name, each in self.vectors.items()}
        save_file(vectors, folder / VECTORS)
        record = {
            "temperature": self.temperature,
            "factors": list(self.factors),
            "sizes": self.sizes.tolist(),
            "words": list(self.words),
            "counts": self.counts.tolist(),
        }
        (folder / WORDS).write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, conditions: Mapping[str, NDArray[np.floating]]) -> Evidence:
        """Read what `save` wrote, of these experts.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError, KeyError, TypeError, SafetensorError: it is not what `save` writes.
        """
        record, tensors = json.loads((folder / WORDS).read_text(encoding="utf-8")), load_file(folder / VECTORS)
        for name, centres in conditions.items():
            shape = tensors[name].shape
            if len(shape) != 2 or not shape[0] or shape[1] != centres.shape[1] or not within(tensors[name], LARGEST):
                raise ValueError(f"evidence of expert '{name}': {list(shape)}")
        words, temperature = record["words"], float(record["temperature"])
        counts, sizes = np.array(record["counts"], np.int64), np.array(record["sizes"], np.int64)
        density, word = (float(factor) for factor in record["factors"])
        counts = counts.reshape(len(conditions), len(words))
        if sizes.shape != (len(conditions),) or (sizes < 1).any() or (counts < 0).any() or (sizes < counts.T).any():
            raise ValueError("evidence: counts of words that no captions have")
        if not all(isinstance(each, str) for each in words) or len(set(words)) < len(words):
            raise ValueError("evidence: words that are none, or not distinct")
        if not (0 < temperature < np.inf and 0 <= density < np.inf and 0 <= word < np.inf):
            raise ValueError(f"evidence: temperature {temperature}, factors {density}, {word}")
        return cls({name: tensors[name] for name in conditions}, words, counts, sizes, temperature, (density, word))


def _uses(vocabulary: Vocabulary, texts: Sequence[str]) -> csr_matrix:
    """[texts, words], 1 where the text has the word."""
    used = vocabulary.count(texts)
    used.data[:] = 1
    return used


def _known(expert: str, captions: Captions, embedder: Embedder) -> Captions:
    """Those captions that the embedder knows a word of."""
    texts, vectors = captions
    if vectors.shape != (len(texts), embedder.dimensions):
        raise ModeError(
            f"evidence of expert '{expert}': {len(texts)} captions, vectors {list(vectors.shape)}; embedder"
            f" '{embedder.name}' has {embedder.dimensions} dimensions",
            "embed again with this embedder",
        )
    said = np.flatnonzero(vectors.any(axis=1))
    if not len(said):
        raise _nothing_known(len(texts), f"of expert '{expert}'", embedder)
    return Captions([texts[number] for number in said.tolist()], vectors[said])


def _nothing_known(captions: int, which: str, embedder: Embedder) -> ModeError:
    return ModeError(
        f"routing: none of {captions} training captions {which} has words that embedder '{embedder.name}' knows",
        "give captions of the experts' sources, or set routing.kind to `published` or `paper`",
    )
