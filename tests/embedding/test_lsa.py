"""LSA: the same as scikit-learn's pipeline, saved without pickles."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from mode.embedding.base import build_embedder, load_embedder
from mode.embedding.lsa import LsaEmbedder
from mode.errors import ModeError
from mode.params import EmbeddingParams

CAPTIONS = [f"{size} {colour} {thing} on the grass" for size in ("small", "large") for colour in ("red", "blue")
            for thing in ("dog", "cat", "shoe")]  # fmt: skip


def test_equals_scikit_learns_pipeline():
    # Captions without symmetry: equal singular values would leave the directions open.
    words = np.random.default_rng(0).choice(["dog", "cat", "red", "blue", "shoe", "grass", "the"], (60, 5))
    captions = [" ".join(row) for row in words]
    ours = LsaEmbedder.fit(captions, dimensions=4, random_seed=0).encode(captions)
    weights = TfidfVectorizer(stop_words="english", min_df=2).fit_transform(captions)
    theirs = normalize(TruncatedSVD(4, random_state=0).fit_transform(weights))
    # Directions may differ in sign; angles between captions may not.
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-4)


def test_rows_have_unit_length_or_no_known_word():
    embedder = LsaEmbedder.fit(CAPTIONS, dimensions=4, random_seed=0)
    vectors = embedder.encode(["a red dog", "of the", "zebra", "", "blue cat"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0, 0, 0, 1], atol=1e-6)
    assert vectors.dtype == np.float32
    assert embedder.encode([]).shape == (0, 4)


def test_row_does_not_depend_on_its_neighbours():
    embedder = LsaEmbedder.fit(CAPTIONS, dimensions=4, random_seed=0)
    together = embedder.encode(CAPTIONS)
    alone = np.concatenate([embedder.encode([caption]) for caption in CAPTIONS])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_fewer_words_than_dimensions():
    embedder = LsaEmbedder.fit(["red dog", "red cat", "dog cat"], dimensions=64, random_seed=0)
    assert embedder.dimensions == 3
    assert embedder.encode(["red"]).shape == (1, 3)


def test_one_word():
    assert abs(LsaEmbedder.fit(["dog"], dimensions=2, random_seed=0).encode(["dog"])).tolist() == [[1.0]]


@pytest.mark.parametrize("captions", [[], ["of the", "a"]])
def test_no_word_is_refused(captions):
    with pytest.raises(ModeError, match=f"none of {len(captions)} captions has a word"):
        build_embedder(EmbeddingParams(), captions, random_seed=0)


def test_saved_and_loaded(tmp_path):
    embedder = build_embedder(EmbeddingParams(dimensions=4), CAPTIONS, random_seed=0)
    embedder.save(tmp_path / "embedder")
    again = load_embedder(tmp_path / "embedder")
    assert np.array_equal(again.encode(CAPTIONS), embedder.encode(CAPTIONS))
    assert again.fingerprint == embedder.fingerprint
    assert (again.name, again.dimensions) == ("lsa", 4)
    assert sorted(path.name for path in (tmp_path / "embedder").iterdir()) == [
        "SHA256SUMS", "embedder.json", "lsa.safetensors", "vocabulary.json"]  # fmt: skip
    other = build_embedder(EmbeddingParams(dimensions=3), CAPTIONS, random_seed=0)
    assert other.fingerprint != embedder.fingerprint


def test_no_embedder_there(tmp_path):
    with pytest.raises(ModeError, match="no embedder there"):
        load_embedder(tmp_path)
